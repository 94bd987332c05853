// Classifies texts that are given as token ids, one text a line, with a plan of fpabee-pack:
//   ./classify_trt FOLDER [OPERATING_POINT] < ids.txt
// Built with TensorRT, CUDA, and the header of nlohmann-json (Debian: nlohmann-json3-dev):
//   CUDA=/usr/local/cuda
//   g++ -std=c++17 -O2 classify_trt.cpp -o classify_trt -I$CUDA/include -L$CUDA/lib64 -lnvinfer -lcudart
// For TensorRT for RTX, take its folders `include` and `lib`, and -ltensorrt_rtx for -lnvinfer. What it
// compiles for this GPU is kept beside the plan.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <NvInfer.h>
#include <cuda_runtime_api.h>
#include <nlohmann/json.hpp>

using Bytes = std::vector<char>;
using Integers = std::vector<std::int64_t>;

// The application gives the context its memory.
constexpr auto kMEMORY = nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED;

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
  if (dtype == "int64") return as_bytes(value.get<Integers>());
  if (dtype == "int32") return as_bytes(value.get<std::vector<std::int32_t>>());
  must(dtype == "float32", "there are no settings of type " + dtype);
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
  // All modules of the Jetson Orin have the same name.
  const std::string name = std::string(device.name) + ", " +
                           std::to_string(device.multiProcessorCount) + " multiprocessors";
  const std::string built_on = plan.value("built_on", name);
  must(built_on == name || (built_on + name).find(" MIG ") == std::string::npos,
       "the plan was built on " + built_on + ", and this is " + name + ": build it again");
  if (built_on != name)
    std::cerr << "the plan was built on " << built_on << ", not on " << name
              << ": it may be slow or fail, so build it again\n";
  const std::string version = plan["versions"].begin().value();
  const std::string installed = std::to_string(getInferLibMajorVersion()) + "." +
                                std::to_string(getInferLibMinorVersion()) + "." +
                                std::to_string(getInferLibPatchVersion());
  must((version + ".").rfind(installed + ".", 0) == 0,
       "the plan is for version " + version + ", not " + installed + ": build it again");
}

// Memory of the device, which is used again, and replaced only where more is needed.
class Memory {
 public:
  void* of(std::size_t size) {
    if (size > size_) {
      size_ = 0;
      address_.reset();
      void* address = nullptr;
      must(cudaMalloc(&address, size));
      address_.reset(address);
      size_ = size;
    }
    return address_.get();
  }

 private:
  struct Free {
    void operator()(void* address) const { cudaFree(address); }
  };
  std::unique_ptr<void, Free> address_;
  std::size_t size_ = 0;
};

// Reads lines of token ids, as many as the plan takes at a time.
class Reader {
 public:
  explicit Reader(const nlohmann::json& shapes)
      : most_rows_(shapes["batch"]["max"]), most_tokens_(shapes["sequence"]["max"]) {}

  // The next texts; there are none at the end.
  std::vector<Integers> next() {
    std::vector<Integers> texts;
    for (std::string line; texts.size() < most_rows_ && std::getline(std::cin, line);) {
      const std::string where = "line " + std::to_string(++number_);
      std::istringstream words(line);
      texts.emplace_back(std::istream_iterator<std::int64_t>(words),
                         std::istream_iterator<std::int64_t>());
      const std::size_t tokens = texts.back().size();
      must(words.eof(), where + " holds something else than token ids: " + line);
      must(tokens > 0, where + " holds no token ids: even an empty text has those of its marks");
      must(tokens <= most_tokens_, where + " holds " + std::to_string(tokens) +
                                       " token ids, and the plan takes at most " +
                                       std::to_string(most_tokens_) + ": cut the text");
    }
    return texts;
  }

 private:
  std::size_t most_rows_;
  std::size_t most_tokens_;
  std::size_t number_ = 0;
};

#ifdef TRT_MAJOR_RTX
// What TensorRT for RTX compiles for this GPU when a shape first runs, kept beside the plan.
class Compiled {
 public:
  Compiled(nvinfer1::ICudaEngine& engine, const std::string& file)
      : file_(file),
        config_(engine.createRuntimeConfig()),
        cache_(config_ == nullptr ? nullptr : config_->createRuntimeCache()) {
    must(cache_ != nullptr, "there is no cache for what is compiled");
    if (std::ifstream(file).good()) kept_ = bytes_of(file);
    // It is refused if it is damaged, or of another GPU or driver, and then replaced.
    if (!kept_.empty()) cache_->deserialize(kept_.data(), kept_.size());
    must(config_->setRuntimeCache(*cache_), "the plan takes no cache");
    config_->setExecutionContextAllocationStrategy(kMEMORY);
    // By default, it compiles in the background while slow kernels run.
    config_->setDynamicShapesKernelSpecializationStrategy(
        nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
  }

  nvinfer1::IRuntimeConfig* config() { return config_.get(); }

  // Called after a batch of a shape.
  void keep(const std::array<std::size_t, 2>& shape) {
    if (!shapes_.insert(shape).second) return;
    const std::unique_ptr<nvinfer1::IHostMemory> memory(cache_->serialize());
    if (memory == nullptr) return;  // the logger has said why
    const char* begin = static_cast<const char*>(memory->data());
    const Bytes content(begin, begin + memory->size());
    if (content == kept_) return;
    std::ofstream file(file_, std::ios::binary);
    if (!file.write(content.data(), content.size()).flush())
      std::cerr << "cannot write " << file_ << ", so the next process compiles again\n";
    kept_ = content;
  }

 private:
  std::string file_;
  Bytes kept_;
  std::set<std::array<std::size_t, 2>> shapes_;
  std::unique_ptr<nvinfer1::IRuntimeConfig> config_;
  std::unique_ptr<nvinfer1::IRuntimeCache> cache_;
};
#endif

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
  const std::size_t fewest_rows = plan["shapes"]["batch"]["min"];
  const std::size_t fewest_tokens = plan["shapes"]["sequence"]["min"];
  const std::size_t most_tokens = plan["shapes"]["sequence"]["max"];

  Logger logger;
  const std::string file = folder + "/" + plan["file"].get<std::string>();
  const Bytes content = bytes_of(file);
  const std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
  must(runtime != nullptr, "TensorRT does not start");
  const std::unique_ptr<nvinfer1::ICudaEngine> engine(
      runtime->deserializeCudaEngine(content.data(), content.size()));
  must(engine != nullptr, "the plan cannot be loaded");
#ifdef TRT_MAJOR_RTX
  Compiled compiled(*engine, file + ".cache");
  const std::unique_ptr<nvinfer1::IExecutionContext> context(
      engine->createExecutionContext(compiled.config()));
#else
  const std::unique_ptr<nvinfer1::IExecutionContext> context(
      engine->createExecutionContext(kMEMORY));
#endif
  must(context != nullptr, "there is no context for the plan");
  cudaStream_t stream;
  must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));

  // By the names of inputs and outputs; that of the context itself has none.
  std::map<std::string, Memory> memories;
  std::map<std::string, Bytes> values;
  for (const auto& input : plan["inputs"]) {
    const std::string name = input["name"];
    must(engine->getTensorLocation(name.c_str()) == nvinfer1::TensorLocation::kDEVICE,
         name + " is not read from the device");
    if (settings.contains(name)) values[name] = setting_of(settings[name], input["dtype"]);
  }

  Reader reader(plan["shapes"]);
  for (auto texts = reader.next(); !texts.empty(); texts = reader.next()) {
    // Rows are padded on the right. Each batch runs until its last row stops.
    const std::size_t rows = std::max(texts.size(), fewest_rows);
    std::size_t tokens = fewest_tokens;
    for (const auto& text : texts) tokens = std::max(tokens, text.size());
    // Few shapes, because each costs time when it first runs.
    tokens = std::min((tokens + 15) / 16 * 16, most_tokens);
    Integers ids, mask;
    for (std::size_t row = 0; row < rows; ++row) {
      const auto& text = texts[std::min(row, texts.size() - 1)];
      ids.insert(ids.end(), text.begin(), text.end());
      mask.insert(mask.end(), text.size(), 1);
      ids.resize((row + 1) * tokens);
      mask.resize((row + 1) * tokens);
    }
    values["input_ids"] = as_bytes(ids);
    values["attention_mask"] = as_bytes(mask);
    // A text has type 0. The second text of a pair has type 1, with the separator behind it.
    values["token_type_ids"] = as_bytes(Integers(ids.size(), 0));

    for (const auto& input : plan["inputs"]) {
      const std::string name = input["name"];
      nvinfer1::Dims shape{};
      for (const auto& size : input["shape"])
        shape.d[shape.nbDims++] = size == "batch"      ? static_cast<std::int64_t>(rows)
                                  : size == "sequence" ? static_cast<std::int64_t>(tokens)
                                                       : size.get<std::int64_t>();
      must(context->setInputShape(name.c_str(), shape), "the shape of " + name + " does not fit");
      const Bytes& value = values.at(name);
      void* address = memories[name].of(value.size());
      must(cudaMemcpyAsync(address, value.data(), value.size(), cudaMemcpyHostToDevice, stream));
      must(context->setInputTensorAddress(name.c_str(), address), "no address for " + name);
    }
    const auto size = context->updateDeviceMemorySizeForShapes();
    must(size > 0, "updateDeviceMemorySizeForShapes returned 0, so these shapes cannot run");
    context->setDeviceMemoryV2(memories[""].of(size), size);
    const std::size_t labels = context->getTensorShape("logits").d[1];
    std::vector<float> logits(rows * labels);
    Integers exits(rows);
    const std::size_t logits_size = logits.size() * sizeof(float);
    const std::size_t exits_size = exits.size() * sizeof(std::int64_t);
    void* logits_address = memories["logits"].of(logits_size);
    void* exits_address = memories["exit"].of(exits_size);
    must(context->setTensorAddress("logits", logits_address), "no address for logits");
    must(context->setTensorAddress("exit", exits_address), "no address for exit");
    must(context->enqueueV3(stream), "the plan does not run");
    must(cudaMemcpyAsync(logits.data(), logits_address, logits_size, cudaMemcpyDeviceToHost,
                         stream));
    must(cudaMemcpyAsync(exits.data(), exits_address, exits_size, cudaMemcpyDeviceToHost, stream));
    must(cudaStreamSynchronize(stream));
    for (std::size_t number = 0; number < texts.size(); ++number) {
      const auto row = logits.begin() + number * labels;
      // NaN: the model cannot read the row. If several labels may be right, compare each logit.
      if (std::all_of(row, row + labels, [](float logit) { return std::isfinite(logit); }))
        std::cout << std::max_element(row, row + labels) - row << " from exit " << exits[number]
                  << "\n";
      else
        std::cout << "no answer\n";
    }
#ifdef TRT_MAJOR_RTX
    compiled.keep({rows, tokens});
#endif
  }
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
