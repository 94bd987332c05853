// CUDA's runtime without a GPU, as far as docs/examples/classify_trt.cpp calls it.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <iostream>

enum cudaError_t { cudaSuccess };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
using cudaStream_t = int;
constexpr unsigned cudaStreamNonBlocking = 1;

struct cudaDeviceProp {
  char name[256];
  int multiProcessorCount;
  int major;
  int minor;
};

inline const char* cudaGetErrorString(cudaError_t) { return "error"; }

inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* device, int) {
  *device = {"Double", 8, 8, 7};
  return cudaSuccess;
}

inline cudaError_t cudaMalloc(void** address, std::size_t size) {
  std::cerr << "cudaMalloc\n";
  *address = std::malloc(size);
  return cudaSuccess;
}

inline cudaError_t cudaFree(void* address) {
  std::free(address);
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t size, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(to, from, size);
  return cudaSuccess;
}

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = 1;
  return cudaSuccess;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
