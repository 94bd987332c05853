// Classifies texts that are given as token ids, one text a line: ./classify model.onnx < ids.txt
// Built with Debian's libonnxruntime-dev, or with an archive of ONNX Runtime in ORT:
//   g++ -std=c++17 -O2 classify.cpp -o classify -I/usr/include/onnxruntime -lonnxruntime
//   g++ -std=c++17 -O2 classify.cpp -o classify -I$ORT/include -L$ORT/lib -Wl,-rpath,$ORT/lib -lonnxruntime
#include <algorithm>
#include <cstdint>
#include <iostream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include <onnxruntime_cxx_api.h>

int main(int argc, char** argv) try {
  if (argc != 2) {
    std::cerr << "usage: classify model.onnx < ids.txt\n";
    return 2;
  }
  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "classify");
  Ort::Session session(env, argv[1], Ort::SessionOptions());
  Ort::AllocatorWithDefaultOptions allocator;
  std::vector<std::string> names;
  for (std::size_t input = 0; input < session.GetInputCount(); ++input)
    names.push_back(session.GetInputNameAllocated(input, allocator).get());
  std::vector<const char*> inputs;
  for (const std::string& name : names) inputs.push_back(name.c_str());
  const std::vector<const char*> outputs = {"logits", "exit"};
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);

  std::vector<std::vector<std::int64_t>> texts;
  std::size_t longest = 0;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    texts.emplace_back(std::istream_iterator<std::int64_t>(words),
                       std::istream_iterator<std::int64_t>());
    longest = std::max(longest, texts.back().size());
  }
  if (texts.empty()) return 0;
  // One batch: its rows are padded on the right, and each leaves at its own exit.
  std::vector<std::int64_t> ids, mask;
  for (const auto& text : texts) {
    ids.insert(ids.end(), text.begin(), text.end());
    mask.insert(mask.end(), text.size(), 1);
    ids.resize(mask.size() + longest - text.size());
    mask.resize(ids.size());
  }
  // A text has type 0. The second text of a pair has type 1, with the separator behind it.
  std::vector<std::int64_t> types(ids.size(), 0);
  const std::vector<std::int64_t> shape = {static_cast<std::int64_t>(texts.size()),
                                           static_cast<std::int64_t>(longest)};
  std::vector<Ort::Value> tensors;
  for (const std::string& name : names) {
    auto& values = name == "input_ids" ? ids : name == "attention_mask" ? mask : types;
    tensors.push_back(Ort::Value::CreateTensor<std::int64_t>(
        memory, values.data(), values.size(), shape.data(), shape.size()));
  }
  const auto answers = session.Run(Ort::RunOptions(), inputs.data(), tensors.data(),
                                   tensors.size(), outputs.data(), outputs.size());
  const float* logits = answers[0].GetTensorData<float>();
  const std::int64_t* exits = answers[1].GetTensorData<std::int64_t>();
  const auto labels = answers[0].GetTensorTypeAndShapeInfo().GetShape()[1];
  for (std::size_t row = 0; row < texts.size(); ++row, logits += labels)
    std::cout << std::max_element(logits, logits + labels) - logits << " from exit "
              << exits[row] << "\n";
} catch (const Ort::Exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
