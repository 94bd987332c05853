// Classifies texts that are given as token ids, one text a line, with a plan of fpabee-pack:
//   ./classify_trt FOLDER [OPERATING_POINT] < ids.txt
// Built with TensorRT, CUDA, and the header of nlohmann-json (Debian: nlohmann-json3-dev):
//   CUDA=/usr/local/cuda
//   g++ -std=c++17 -O2 classify_trt.cpp -o classify_trt -I$CUDA/include -L$CUDA/lib64 -lnvinfer -lcudart
// For TensorRT for RTX, take its folders `include` and `lib`, and -ltensorrt_rtx for -lnvinfer.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <NvInfer.h>
#include <cuda_runtime_api.h>
#include <nlohmann/json.hpp>

using Bytes = std::vector<char>;

void must(bool done, const std::string& what) {
  if (!done) throw std::runtime_error(what);
}

void must(cudaError_t status) { must(status == cudaSuccess, cudaGetErrorString(status)); }

struct Logger : nvinfer1::ILogger {
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kWARNING) std::cerr << message << "\n";
  }
};

Bytes bytes_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  must(file.good(), "cannot read " + path);
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

template <typename Number>
Bytes as_bytes(const std::vector<Number>& numbers) {
  const char* begin = reinterpret_cast<const char*>(numbers.data());
  return Bytes(begin, begin + numbers.size() * sizeof(Number));
}

// A setting is one number or a list of them.
Bytes setting_of(nlohmann::json value, const std::string& dtype) {
  if (!value.is_array()) value = nlohmann::json::array({value});
  if (dtype == "int64") return as_bytes(value.get<std::vector<std::int64_t>>());
  return as_bytes(value.get<std::vector<float>>());
}

// A plan runs only on the GPUs, and with the version of the library, that it was built for.
void check_device(const nlohmann::json& plan) {
  cudaDeviceProp device;
  must(cudaGetDeviceProperties(&device, 0));
  const std::string here = std::to_string(device.major) + "." + std::to_string(device.minor);
  const auto gpus = plan["compute_capabilities"].get<std::vector<std::string>>();
  must(std::find(gpus.begin(), gpus.end(), here) != gpus.end(),
       "the plan is not for compute capability " + here + ": build it again");
  const std::string version = plan["versions"].begin().value();
  const std::string installed = std::to_string(getInferLibMajorVersion()) + "." +
                                std::to_string(getInferLibMinorVersion()) + "." +
                                std::to_string(getInferLibPatchVersion());
  must((version + ".").rfind(installed + ".", 0) == 0,
       "the plan is for version " + version + ", not " + installed + ": build it again");
}

int main(int argc, char** argv) try {
  if (argc != 2 && argc != 3) {
    std::cerr << "usage: classify_trt FOLDER [OPERATING_POINT] < ids.txt\n";
    return 2;
  }
  const std::string folder = argv[1];
  const auto description = nlohmann::json::parse(bytes_of(folder + "/fpabee.json"));
  const auto& plan = description["plan"];
  const auto& settings = argc == 2 ? description["settings"]
                                   : description["operating_points"].at(argv[2])["settings"];
  check_device(plan);

  std::vector<std::vector<std::int64_t>> texts;
  const std::size_t least = plan["shapes"]["sequence"]["min"];
  std::size_t tokens = least;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    texts.emplace_back(std::istream_iterator<std::int64_t>(words),
                       std::istream_iterator<std::int64_t>());
    must(words.eof(), "a line holds something else than token ids: " + line);
    tokens = std::max(tokens, texts.back().size());
  }
  if (texts.empty()) return 0;
  must(tokens <= plan["shapes"]["sequence"]["max"], "the plan takes fewer tokens");
  must(texts.size() <= plan["shapes"]["batch"]["max"], "the plan takes fewer texts");

  // One batch, whose rows are padded on the right. It runs until its last row stops.
  std::vector<std::int64_t> ids, mask;
  for (const auto& text : texts) {
    ids.insert(ids.end(), text.begin(), text.end());
    mask.insert(mask.end(), text.size(), 1);
    ids.resize(mask.size() + tokens - text.size());
    mask.resize(ids.size());
  }
  // A text has type 0. The second text of a pair has type 1, with the separator behind it.
  std::map<std::string, Bytes> values = {
      {"input_ids", as_bytes(ids)},
      {"attention_mask", as_bytes(mask)},
      {"token_type_ids", as_bytes(std::vector<std::int64_t>(ids.size(), 0))}};

  Logger logger;
  const Bytes content = bytes_of(folder + "/" + plan["file"].get<std::string>());
  const std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
  must(runtime != nullptr, "TensorRT does not start");
  const std::unique_ptr<nvinfer1::ICudaEngine> engine(
      runtime->deserializeCudaEngine(content.data(), content.size()));
  must(engine != nullptr, "the plan cannot be loaded");
  const std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext(
      nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
  must(context != nullptr, "there is no context for the plan");
  cudaStream_t stream;
  must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));

  for (const auto& input : plan["inputs"]) {
    const std::string name = input["name"];
    const bool is_setting = settings.contains(name);
    Bytes& value = values[name];
    if (is_setting) value = setting_of(settings[name], input["dtype"]);
    nvinfer1::Dims shape{};
    for (const auto& size : input["shape"])
      shape.d[shape.nbDims++] = size == "batch"      ? static_cast<std::int64_t>(texts.size())
                                : size == "sequence" ? static_cast<std::int64_t>(tokens)
                                                     : size.get<std::int64_t>();
    must(context->setInputShape(name.c_str(), shape), "the shape of " + name + " does not fit");
    must(engine->getTensorLocation(name.c_str()) == nvinfer1::TensorLocation::kDEVICE,
         name + " is not read from the device");
    void* address;
    must(cudaMalloc(&address, value.size()));
    must(cudaMemcpyAsync(address, value.data(), value.size(), cudaMemcpyHostToDevice, stream));
    must(context->setInputTensorAddress(name.c_str(), address), "no address for " + name);
  }
  const auto size = context->updateDeviceMemorySizeForShapes();
  void* memory = nullptr;
  if (size > 0) must(cudaMalloc(&memory, size));
  context->setDeviceMemoryV2(memory, size);
  const std::size_t labels = context->getTensorShape("logits").d[1];
  std::vector<float> logits(texts.size() * labels);
  std::vector<std::int64_t> exits(texts.size());
  void* logits_address;
  void* exits_address;
  must(cudaMalloc(&logits_address, logits.size() * sizeof(float)));
  must(cudaMalloc(&exits_address, exits.size() * sizeof(std::int64_t)));
  must(context->setTensorAddress("logits", logits_address), "no address for logits");
  must(context->setTensorAddress("exit", exits_address), "no address for exit");
  must(context->enqueueV3(stream), "the plan does not run");
  must(cudaMemcpyAsync(logits.data(), logits_address, logits.size() * sizeof(float),
                       cudaMemcpyDeviceToHost, stream));
  must(cudaMemcpyAsync(exits.data(), exits_address, exits.size() * sizeof(std::int64_t),
                       cudaMemcpyDeviceToHost, stream));
  must(cudaStreamSynchronize(stream));
  auto row = logits.begin();
  for (const std::int64_t number : exits) {
    // NaN: the model cannot read the row. If several labels may be right, compare each logit.
    if (std::all_of(row, row + labels, [](float logit) { return std::isfinite(logit); }))
      std::cout << std::max_element(row, row + labels) - row << " from exit " << number << "\n";
    else
      std::cout << "no answer\n";
    row += labels;
  }
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
