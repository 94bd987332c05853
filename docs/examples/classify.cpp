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

  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream words(line);
    std::vector<std::int64_t> ids{std::istream_iterator<std::int64_t>(words), {}};
    std::vector<std::int64_t> mask(ids.size(), 1);
    // A text has type 0. The second text of a pair has type 1, with the separator behind it.
    std::vector<std::int64_t> types(ids.size(), 0);
    const std::vector<std::int64_t> shape = {1, static_cast<std::int64_t>(ids.size())};
    std::vector<Ort::Value> tensors;
    for (const std::string& name : names) {
      auto& values = name == "input_ids" ? ids : name == "attention_mask" ? mask : types;
      tensors.push_back(Ort::Value::CreateTensor<std::int64_t>(
          memory, values.data(), values.size(), shape.data(), shape.size()));
    }
    const auto found = session.Run(Ort::RunOptions(), inputs.data(), tensors.data(),
                                   tensors.size(), outputs.data(), outputs.size());
    const float* logits = found[0].GetTensorData<float>();
    const auto labels = found[0].GetTensorTypeAndShapeInfo().GetElementCount();
    const auto label = std::max_element(logits, logits + labels) - logits;
    std::cout << label << " from exit " << found[1].GetTensorData<std::int64_t>()[0] << "\n";
  }
} catch (const Ort::Exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
