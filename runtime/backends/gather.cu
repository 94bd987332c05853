/* Gathers the rows of a tensor that go on.

   gather.ptx was made from this file by NVRTC 12.4 with --gpu-architecture=compute_75. The driver
   compiles it for its GPU. A driver refuses PTX from a compiler that is newer than itself, and 12.4
   is the oldest version of CUDA that is supported. */

#define MOST_SOURCES 256 /* so that all fits into the parameters of a kernel, 4096 bytes */

typedef unsigned long long Word;

typedef struct {
  char *to;                        /* the first row of the new group */
  Word pitch, fill;                /* its bytes; what follows a source, repeated */
  const char *sources[MOST_SOURCES];
  unsigned widths[MOST_SOURCES];   /* bytes to copy; 0 for a row of padding */
} Gather;

/* Row x of the new group, which the blocks y share. */
extern "C" __global__ void gather_rows(const __grid_constant__ Gather set) {
  Word first = blockIdx.y * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.x;
  Word width = set.widths[blockIdx.x], size = set.pitch;
  char *to = set.to + blockIdx.x * size;
  const char *from = set.sources[blockIdx.x];
  if (((Word)to | (Word)from | width | size) % sizeof(Word) == 0)
    for (Word i = first; i < size / sizeof(Word); i += step)
      ((Word *)to)[i] = i < width / sizeof(Word) ? ((const Word *)from)[i] : set.fill;
  else
    for (Word i = first; i < size; i += step)
      to[i] = i < width ? from[i] : (char)(set.fill >> 8 * (i % sizeof(Word)));
}
