/* decide.h and gather.h for a GPU. scripts/decide_ptx.py compiles them. */

#define LANES 32
#define LANE (int)threadIdx.x
#define SYNC_LANES __syncwarp()
#define ONE_COPY __noinline__ /* a shorter PTX, which the driver compiles sooner */

static ONE_COPY double sum_of(double value) {
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

static ONE_COPY double max_of(double value) {
  for (int step = 16; step; step /= 2) value = fmax(value, __shfl_xor_sync(~0u, value, step));
  return value;
}

#include "decide.h"
#include "gather.h"

/* Declared here because the headers of CUDA are not needed otherwise. */
extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(
    unsigned long long handle, unsigned int value);

/* One block, whose warps share the rows. Every GPU has enough registers for 256 threads. The IF
   node of the handle runs its body if a row goes on; the last exit has none. */
extern "C" __global__ void __launch_bounds__(256)
decide_exit(void *board, const float *now, int exit, int rows, unsigned long long handle) {
  int going = decide(board, now, exit, rows, threadIdx.y, blockDim.y);
  going = __syncthreads_or(going);
  if (threadIdx.x + threadIdx.y == 0 && exit < ((Settings *)board)->exits)
    cudaGraphSetConditional(handle, going);
}

/* Row x of the new group, which the blocks y share. */
extern "C" __global__ void gather_rows(const __grid_constant__ Gather set) {
  gather(&set, blockIdx.x, blockIdx.y * blockDim.x + threadIdx.x, gridDim.y * blockDim.x);
}
