/* decide.h with counters of what takes long on a GPU: functions of doubles, and reductions. */

#include <math.h>

int functions, reductions;

#define exp(value) (functions++, exp(value))
#define log(value) (functions++, log(value))
#define tanh(value) (functions++, tanh(value))

#define LANES 1
#define LANE 0
#define SYNC_LANES
#define ONE_COPY
#define sum_of(value) (reductions++, (value))
#define max_of(value) (reductions++, (value))

#include "decide.h"
