/* Decides after an exit which rows of a group stop, as the rules in runtime/rules do.

   It is plain C, so that a C compiler can compile it for tests. decide.cu compiles it for a GPU,
   where the 32 lanes of a warp share the labels of a row. Everything that it reads and writes is
   in one piece of memory, the board, whose fields are described in __init__.py. A row that has
   stopped keeps its exit.

   Many GPUs are slow with doubles, and this runs after every exit. So it computes only the scores
   that the rule reads, and only what these need. */

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

/* Sets of scores: the measures, those that come from Sums, and those that read a member of it. */
#define BIT(score) (1 << (score))
enum {
  MEASURES = BIT(CHANGED) - BIT(KD),
  OF_SUMS = MEASURES | BIT(ENTROPY),
  READ_PP = BIT(KL) | BIT(SYMKL) | BIT(JSD),
  READ_QQ = BIT(REKL) | BIT(SYMKL) | BIT(JSD) | BIT(ENTROPY),
  READ_PQ = BIT(KD) | BIT(SYMKD) | BIT(KL) | BIT(SYMKL),
  READ_QP = BIT(REKD) | BIT(SYMKD) | BIT(REKL) | BIT(SYMKL),
  READ_M = BIT(JSKD) | BIT(JSD)
};

typedef struct {
  int labels, exits, multi_label, has_exit_0, sure, settled, patience, min_exit, max_exit, unused;
} Settings;

/* Cross-entropies -sum a log b of the distributions p and q of two exits and of their mean m. */
typedef struct { double pp, qq, pq, qp, pm, qm; } Sums;

/* The largest logit, its first label, and the sum of exp(logit - largest). */
typedef struct { double largest, total; int label; } Top;

/* The probabilities of a label and of its absence. */
typedef struct { double yes, no; } Pair;

static ONE_COPY double log_of(double value) { return log(value > 1e-12 ? value : 1e-12); }

static double difference(double a, double b) { return a > b ? a - b : 0; }

static ONE_COPY Pair sigmoid(double logit) {
  double small = exp(-fabs(logit)), more = 1 / (1 + small), less = small / (1 + small);
  Pair pair = {logit >= 0 ? more : less, logit >= 0 ? less : more};
  return pair;
}

/* Only what is asked for. */
static ONE_COPY Top top_of(const float *logits, int labels, int with_total, int with_label) {
  Top top = {logits[0], 0, 0};
  double first = labels;
  if (!with_total && !with_label) return top;
  for EACH_LABEL(i) if (logits[i] > top.largest) top.largest = logits[i];
  top.largest = max_of(top.largest);
  for EACH_LABEL(i) {
    if (with_total) top.total += exp(logits[i] - top.largest);
    if (logits[i] == top.largest && i < first) first = i;
  }
  if (with_total) top.total = sum_of(top.total);
  if (with_label) top.label = (int)-max_of(-first);
  return top;
}

static ONE_COPY void add_outcome(Sums *sums, double p, double q, int wanted) {
  double log_p = wanted & (READ_PP | READ_QP) ? log_of(p) : 0;
  double log_q = wanted & (READ_QQ | READ_PQ) ? log_of(q) : 0;
  double log_m = wanted & READ_M ? log_of((p + q) / 2) : 0;
  sums->pp -= p * log_p, sums->qq -= q * log_q;
  sums->pq -= p * log_q, sums->qp -= q * log_p;
  sums->pm -= p * log_m, sums->qm -= q * log_m;
}

static double score_of(int score, const Sums *sums) {
  double kl = difference(sums->pq, sums->pp), rekl = difference(sums->qp, sums->qq);
  switch (score) {
    case KD: return sums->pq;
    case REKD: return sums->qp;
    case SYMKD: return sums->pq + sums->qp;
    case JSKD: return (sums->pm + sums->qm) / 2;
    case KL: return kl;
    case REKL: return rekl;
    case SYMKL: return kl + rekl;
    case JSD: return (difference(sums->pm, sums->pp) + difference(sums->qm, sums->qq)) / 2;
    default: return sums->qq;
  }
}

/* Adds the scores that come from sums. */
static ONE_COPY void add_scores(double *scores, const Sums *sums, int wanted) {
  for (int score = KD; score <= ENTROPY; score++)
    if (wanted & OF_SUMS & BIT(score)) scores[score] += score_of(score, sums);
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
  int wanted = (BIT(set->sure) | BIT(set->settled)) & ~BIT(NONE), streak = streaks[row];
  if (stops[row]) return 0;
  if (!has_earlier) wanted &= ~(MEASURES | BIT(CHANGED));
  if (wanted & BIT(LEARNED)) wanted |= BIT(ENTROPY) | BIT(CONFIDENCE) | BIT(JSKD) | BIT(JSD);
  if (exit >= set->max_exit) wanted = 0;
  int of_tops = set->multi_label ? wanted & BIT(ENERGY) : wanted;
  Top before = top_of(y, labels, of_tops & MEASURES, of_tops & BIT(CHANGED));
  Top top = top_of(z, labels, of_tops & (OF_SUMS | BIT(CONFIDENCE) | BIT(ENERGY)),
                   of_tops & (BIT(CHANGED) | BIT(LEARNED)));
  for EACH_LABEL(i) {
    kept[i] = z[i];
    if (set->multi_label && wanted & ~BIT(ENERGY)) {
      Pair p = {0, 0}, q = sigmoid(z[i]);
      Sums both = {0};
      if (wanted & (MEASURES | BIT(CHANGED))) p = sigmoid(y[i]);
      if (wanted & OF_SUMS) {
        add_outcome(&both, p.yes, q.yes, wanted);
        add_outcome(&both, p.no, q.no, wanted);
        add_scores(scores, &both, wanted);
      }
      if (fmax(q.yes, q.no) < least) least = fmax(q.yes, q.no);
      if ((p.yes > cuts[i]) != (q.yes > cuts[i])) changes = 1;
      if (q.yes > cuts[i]) of_labels += label_weights[i];
    } else if (!set->multi_label && wanted & OF_SUMS) {
      double p = wanted & MEASURES ? exp(y[i] - before.largest) / before.total : 0;
      add_outcome(&sums, p, exp(z[i] - top.largest) / top.total, wanted);
      if (i == top.label) of_labels = label_weights[i];
    }
  }
  if (set->multi_label) {
    for (int score = KD; score <= ENTROPY; score++)
      if (wanted & OF_SUMS & BIT(score)) scores[score] = sum_of(scores[score]);
    if (wanted & BIT(CONFIDENCE)) least = -max_of(-least);
    if (wanted & BIT(CHANGED)) changes = max_of(changes);
  } else {
    if (wanted & READ_PP) sums.pp = sum_of(sums.pp);
    if (wanted & READ_QQ) sums.qq = sum_of(sums.qq);
    if (wanted & READ_PQ) sums.pq = sum_of(sums.pq);
    if (wanted & READ_QP) sums.qp = sum_of(sums.qp);
    if (wanted & READ_M) sums.pm = sum_of(sums.pm), sums.qm = sum_of(sums.qm);
    add_scores(scores, &sums, wanted);
    if (wanted & BIT(CONFIDENCE)) least = 1 / top.total;
    changes = before.label != top.label;
  }
  scores[CHANGED] = changes;
  scores[CONFIDENCE] = -least;
  if (wanted & BIT(ENERGY)) {
    double rest = top.largest < 0 ? 1 : exp(-top.largest);
    scores[ENERGY] = rest / (rest + top.total * (top.largest < 0 ? exp(top.largest) : 1));
  }
  if (wanted & BIT(LEARNED))
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
