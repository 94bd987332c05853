/* decide.h with threads in place of the lanes of a warp, to test how they share a row. */

#include <math.h>
#include <pthread.h>

#define LANES 4
#define LANE lane
#define SYNC_LANES pthread_barrier_wait(&barrier)
#define ONE_COPY

static __thread int lane;
static pthread_barrier_t barrier;
static double values[LANES];

static double reduced(double value, int is_sum) {
  values[lane] = value;
  SYNC_LANES;
  double result = values[0];
  for (int i = 1; i < LANES; i++)
    result = is_sum ? result + values[i] : fmax(result, values[i]);
  SYNC_LANES;
  return result;
}

static double sum_of(double value) { return reduced(value, 1); }
static double max_of(double value) { return reduced(value, 0); }

#include "decide.h"

typedef struct { void *board; const float *now; int exit, rows, lane, going; } Call;

static void *in_lane(void *argument) {
  Call *call = argument;
  lane = call->lane;
  call->going = decide(call->board, call->now, call->exit, call->rows, 0, 1);
  return 0;
}

/* Returns -1 if the lanes do not agree. */
int decide_in_lanes(void *board, const float *now, int exit, int rows) {
  pthread_t threads[LANES];
  Call calls[LANES];
  pthread_barrier_init(&barrier, 0, LANES);
  for (int i = 0; i < LANES; i++) {
    calls[i] = (Call){board, now, exit, rows, i, 0};
    pthread_create(&threads[i], 0, in_lane, &calls[i]);
  }
  for (int i = 0; i < LANES; i++) pthread_join(threads[i], 0);
  pthread_barrier_destroy(&barrier);
  for (int i = 1; i < LANES; i++)
    if (calls[i].going != calls[0].going) return -1;
  return calls[0].going;
}
