/* Gathers the rows of a tensor that go on, in plain C like decide.h.

   decide.cu runs it with several blocks of threads for each row of the new group. */

#define MOST_SOURCES 256 /* so that all fits into the parameters of a kernel, 4096 bytes */

typedef unsigned long long Word;

typedef struct {
  char *to;                        /* the first row of the new group */
  Word pitch, fill;                /* its bytes; what follows a source, repeated */
  const char *sources[MOST_SOURCES];
  unsigned widths[MOST_SOURCES];   /* bytes to copy; 0 for a row of padding */
} Gather;

/* The share of one of several threads, of which this is the first, first + step, ... */
void gather(const Gather *set, int row, Word first, Word step) {
  char *to = set->to + row * set->pitch;
  const char *from = set->sources[row];
  Word width = set->widths[row], size = set->pitch;
  if (((Word)to | (Word)from | width | size) % sizeof(Word) == 0)
    for (Word i = first; i < size / sizeof(Word); i += step)
      ((Word *)to)[i] = i < width / sizeof(Word) ? ((const Word *)from)[i] : set->fill;
  else
    for (Word i = first; i < size; i += step)
      to[i] = i < width ? from[i] : (char)(set->fill >> 8 * (i % sizeof(Word)));
}
