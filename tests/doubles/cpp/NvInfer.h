// TensorRT, and with TRT_MAJOR_RTX TensorRT for RTX, without a GPU, as far as
// docs/examples/classify_trt.cpp calls it. The one plan has three labels: the label of a row is the
// sum of its ids modulo 3, and its exit is the number of its tokens plus the patience.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <string>

#include "cuda_runtime_api.h"

inline int getInferLibMajorVersion() { return 10; }
inline int getInferLibMinorVersion() { return 3; }
inline int getInferLibPatchVersion() { return 0; }

namespace nvinfer1 {

enum class TensorLocation { kDEVICE, kHOST };
enum class ExecutionContextAllocationStrategy { kSTATIC, kUSER_MANAGED };

struct Dims {
  int nbDims;
  std::int64_t d[8];
};

struct ILogger {
  enum class Severity { kERROR, kWARNING, kINFO };
  virtual ~ILogger() = default;
  virtual void log(Severity severity, const char* message) noexcept = 0;
};

struct IHostMemory {
  std::string content;
  const void* data() const { return content.data(); }
  std::size_t size() const { return content.size(); }
};

#ifdef TRT_MAJOR_RTX
enum class DynamicShapesKernelSpecializationStrategy { kLAZY, kEAGER };

struct IRuntimeCache {
  std::string content;
  IHostMemory* serialize() const { return new IHostMemory{content}; }
  bool deserialize(const void* data, std::size_t size) {
    content.assign(static_cast<const char*>(data), size);
    return true;
  }
};

struct IRuntimeConfig {
  IRuntimeCache* cache = nullptr;
  IRuntimeCache* createRuntimeCache() const { return new IRuntimeCache; }
  bool setRuntimeCache(const IRuntimeCache& each) {
    cache = const_cast<IRuntimeCache*>(&each);
    return true;
  }
  void setExecutionContextAllocationStrategy(ExecutionContextAllocationStrategy) {}
  void setDynamicShapesKernelSpecializationStrategy(DynamicShapesKernelSpecializationStrategy) {}
};
#else
struct IRuntimeConfig;
#endif

struct IExecutionContext {
  [[maybe_unused]] IRuntimeConfig* config = nullptr;
  std::map<std::string, Dims> shapes;
  std::map<std::string, void*> addresses;

  bool setInputShape(const char* name, const Dims& shape) {
    shapes[name] = shape;
    return true;
  }
  bool setInputTensorAddress(const char* name, const void* address) {
    return setTensorAddress(name, const_cast<void*>(address));
  }
  bool setTensorAddress(const char* name, void* address) {
    addresses[name] = address;
    return true;
  }
  std::size_t updateDeviceMemorySizeForShapes() {
    const char* size = std::getenv("SIZE");
    return size == nullptr ? 64 : std::atoi(size);
  }
  void setDeviceMemoryV2(void*, std::int64_t) {}
  Dims getTensorShape(const char*) const { return {2, {shapes.at("input_ids").d[0], 3}}; }

  template <typename Number>
  Number* at(const char* name) {
    return static_cast<Number*>(addresses.at(name));
  }

  bool enqueueV3(cudaStream_t) {
    const std::int64_t rows = shapes.at("input_ids").d[0];
    const std::int64_t tokens = shapes.at("input_ids").d[1];
    std::cerr << "ran " << rows << " x " << tokens << "\n";
    for (std::int64_t row = 0; row < rows; ++row) {
      std::int64_t sum = 0;
      std::int64_t length = 0;
      for (std::int64_t place = row * tokens; place < (row + 1) * tokens; ++place) {
        sum += at<std::int64_t>("input_ids")[place];
        length += at<std::int64_t>("attention_mask")[place];
      }
      float* logits = at<float>("logits") + 3 * row;
      std::fill(logits, logits + 3, 0.0F);
      logits[sum % 3] = 1.0F;
      at<std::int64_t>("exit")[row] = length + *at<std::int32_t>("fpabee.patience");
    }
#ifdef TRT_MAJOR_RTX
    const std::string shape = std::to_string(rows) + "x" + std::to_string(tokens) + " ";
    std::string& compiled = config->cache->content;
    if (compiled.find(shape) == std::string::npos) compiled += shape;
#endif
    return true;
  }
};

struct ICudaEngine {
  TensorLocation getTensorLocation(const char*) const { return TensorLocation::kDEVICE; }
  IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy) {
    return new IExecutionContext;
  }
  IExecutionContext* createExecutionContext(IRuntimeConfig* config) {
    return new IExecutionContext{config, {}, {}};
  }
#ifdef TRT_MAJOR_RTX
  IRuntimeConfig* createRuntimeConfig() { return new IRuntimeConfig; }
#endif
};

struct IRuntime {
  ICudaEngine* deserializeCudaEngine(const void*, std::size_t) { return new ICudaEngine; }
};

inline IRuntime* createInferRuntime(ILogger&) { return new IRuntime; }

}  // namespace nvinfer1
