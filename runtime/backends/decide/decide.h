/* Decides after an exit which rows of a group stop, as the rules in runtime/rules do.

   It is plain C, so that a C compiler can compile it for tests. decide.cu compiles it for a GPU,
   where the 32 lanes of a warp share the labels of a row. Everything that it reads and writes is
   in one piece of memory, the board, whose fields are described in __init__.py. A row that has
   stopped keeps its exit. */

#ifndef LANES
#include <math.h>
#define LANES 1
#define LANE 0
#define SYNC_LANES
#define ONE_COPY
#define sum_of(value) (value)
#define max_of(value) (value)
#endif

#define EACH_LABEL(i) (int i = LANE; i < labels; i += LANES)
#define FEATURES 5

/* The scores, in the order of SCORES in __init__.py. Those up to CHANGED compare two exits. */
enum { NONE, KD, REKD, SYMKD, JSKD, KL, REKL, SYMKL, JSD, CHANGED,
       ENTROPY, CONFIDENCE, ENERGY, LEARNED, SCORES };

typedef struct {
  int labels, exits, multi_label, has_exit_0, sure, settled, patience, min_exit, max_exit, unused;
} Settings;

/* Cross-entropies -sum a log b of the distributions p and q of two exits and of their mean m. */
typedef struct { double pp, qq, pq, qp, pm, qm; } Sums;

/* The largest logit, its first label, and the sum of exp(logit - largest). */
typedef struct { double largest, total; int label; } Top;

static ONE_COPY double log_of(double value) { return log(value > 1e-12 ? value : 1e-12); }

static double difference(double a, double b) { return a > b ? a - b : 0; }

static ONE_COPY double sigmoid(double logit) {
  double small = exp(-fabs(logit));
  return (logit >= 0 ? 1 : small) / (1 + small);
}

static ONE_COPY Top top_of(const float *logits, int labels) {
  Top top = {logits[0], 0, 0};
  double first = labels;
  for EACH_LABEL(i) if (logits[i] > top.largest) top.largest = logits[i];
  top.largest = max_of(top.largest);
  for EACH_LABEL(i) {
    top.total += exp(logits[i] - top.largest);
    if (logits[i] == top.largest && i < first) first = i;
  }
  top.total = sum_of(top.total);
  top.label = (int)-max_of(-first);
  return top;
}

static ONE_COPY void add_outcome(Sums *sums, double p, double q) {
  double log_p = log_of(p), log_q = log_of(q), log_m = log_of((p + q) / 2);
  sums->pp -= p * log_p, sums->qq -= q * log_q;
  sums->pq -= p * log_q, sums->qp -= q * log_p;
  sums->pm -= p * log_m, sums->qm -= q * log_m;
}

static void add_scores(double *scores, Sums sums) {
  double kl = difference(sums.pq, sums.pp), rekl = difference(sums.qp, sums.qq);
  scores[KD] += sums.pq, scores[REKD] += sums.qp, scores[SYMKD] += sums.pq + sums.qp;
  scores[JSKD] += (sums.pm + sums.qm) / 2;
  scores[KL] += kl, scores[REKL] += rekl, scores[SYMKL] += kl + rekl;
  scores[JSD] += (difference(sums.pm, sums.pp) + difference(sums.qm, sums.qq)) / 2;
  scores[ENTROPY] += sums.qq;
}

/* Whether a row goes on after an exit from 1 on; now is [rows, labels]. */
static int goes_on(Settings *set, const float *now, int exit, int rows, int row) {
  int labels = set->labels, has_earlier = exit > 1 || set->has_exit_0;
  double *sure_below = (double *)(set + 1), *settled_below = sure_below + set->exits;
  double *cuts = settled_below + set->exits, *label_weights = cuts + labels;
  double *all_weights = label_weights + labels, *weights = all_weights + FEATURES * (exit - 1);
  int *stops = (int *)(all_weights + FEATURES * set->exits), *streaks = stops + rows;
  float *kept = (float *)(streaks + rows) + (exit * rows + row) * labels;
  const float *z = now + row * labels, *y = has_earlier ? kept - rows * labels : z;
  double scores[SCORES] = {0}, least = 1, changes = 0, of_labels = 0;
  Sums sums = {0};
  int streak = streaks[row];
  if (stops[row]) return 0;
  Top before = top_of(y, labels), top = top_of(z, labels);
  for EACH_LABEL(i) {
    kept[i] = z[i];
    if (set->multi_label) {
      double p = sigmoid(y[i]), q = sigmoid(z[i]), surer = sigmoid(fabs(z[i]));
      Sums both = {0};
      add_outcome(&both, p, q);
      add_outcome(&both, sigmoid(-y[i]), sigmoid(-z[i]));
      add_scores(scores, both);
      if (surer < least) least = surer;
      if ((p > cuts[i]) != (q > cuts[i])) changes = 1;
      if (q > cuts[i]) of_labels += label_weights[i];
    } else {
      double p = exp(y[i] - before.largest) / before.total;
      add_outcome(&sums, p, exp(z[i] - top.largest) / top.total);
      if (i == top.label) of_labels = label_weights[i];
    }
  }
  if (set->multi_label) {
    for (int kind = 0; kind < SCORES; kind++) scores[kind] = sum_of(scores[kind]);
    least = -max_of(-least), changes = max_of(changes);
  } else {
    sums.pp = sum_of(sums.pp), sums.qq = sum_of(sums.qq), sums.pq = sum_of(sums.pq);
    sums.qp = sum_of(sums.qp), sums.pm = sum_of(sums.pm), sums.qm = sum_of(sums.qm);
    add_scores(scores, sums);
    least = 1 / top.total, changes = before.label != top.label;
  }
  double rest = top.largest < 0 ? 1 : exp(-top.largest);
  scores[ENERGY] = rest / (rest + top.total * (top.largest < 0 ? exp(top.largest) : 1));
  scores[CHANGED] = changes;
  scores[CONFIDENCE] = -least;
  scores[LEARNED] = 0.5 + 0.5 * tanh(0.5 * (weights[0] + weights[1] * scores[ENTROPY] +
      weights[2] * least + weights[3] * scores[JSKD] + weights[4] * scores[JSD] +
      sum_of(of_labels)));
  int sure = (has_earlier || set->sure > CHANGED) && scores[set->sure] < sure_below[exit - 1];
  int settled =
      (has_earlier || set->settled > CHANGED) && scores[set->settled] < settled_below[exit - 1];
  streak = settled ? streak + 1 : 0;
  int going = exit < set->max_exit &&
      !(exit >= set->min_exit && (sure || streak >= set->patience));
  SYNC_LANES;
  if (LANE == 0) {
    streaks[row] = streak;
    if (!going) stops[row] = exit;
  }
  return going;
}

/* Decides about the rows first, first + step, ... and returns whether any of them goes on. */
int decide(void *board, const float *now, int exit, int rows, int first, int step) {
  int going = 0;
  for (int row = first; row < rows; row += step)
    going |= goes_on((Settings *)board, now, exit, rows, row);
  return going;
}
