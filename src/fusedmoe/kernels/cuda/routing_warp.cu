// The routing of most rules, a warp for each token: scores, the choice of K experts, weights.
//
// A lane has every 32nd expert. Experts are compared by keys, fp32 numbers as integers of the same
// order. What is chosen is at least the K-th of the lanes' largest keys: few experts are (9 of 384 for
// K = 8), and each of those finds its rank among them by itself. Where they are more than lanes (equal
// scores), they are chosen one after the other.
//
// Invariants: fp32 arithmetic; equal scores go to the lower id; other tokens change no bit.
//
// Constants come from the launcher as macros; routing_warp.py names them.

struct Arguments {
  const u8 *logits, *bias, *scale, *padding;
  float* weights;
  void* ids;
  i64 stride_row, stride_expert, stride_padding;  // elements
  int T;
  float epsilon, floor, factor;
};

enum { FP32, BF16, FP16 };
enum { SOFTMAX, SIGMOID };
constexpr int COLUMNS = (EXPERTS + 31) / 32;
constexpr bool BIASED = BIAS >= 0, BY_SCORE = !AFTER_TOPK && !BIASED;
constexpr float LOG2_E = 1.44269504f;
constexpr int REMOVED = -2147483647 - 1, MINUS_INFINITY = -2139095041;  // keys; of no expert

DEVICE float infinity() { return as_float(0x7F800000u); }
template <int TYPE>
DEVICE float load_as_float(const u8* from, i64 index) {
  if (TYPE == FP32) return as_float((u32)load_past_l1((const int*)from + index));
  const u16 bits = load_past_l1((const u16*)from + index);
  return TYPE == BF16 ? as_float((u32)bits << 16) : half_float(bits);
}
DEVICE float finite_or(float x, float other) { return fabsf(x) < infinity() ? x : other; }
DEVICE int ordered(float x) {
  const int bits = (int)__float_as_uint(x + 0.0f);  // zeros become one value
  return bits ^ (bits >> 31 & 0x7FFFFFFF);
}
DEVICE float from_ordered(int key) { return as_float((u32)(key ^ (key >> 31 & 0x7FFFFFFF))); }
// Scores are no less than zero: their bits are keys.
DEVICE int key_of(float x) { return BY_SCORE ? (int)__float_as_uint(x) : ordered(x); }
DEVICE float of_key(int key) { return BY_SCORE ? as_float((u32)key) : from_ordered(key); }
// All of them by ``join``, in pairs.
template <int N, class Number, class Join>
DEVICE Number joined(const Number (&of)[N], Join join) {
  Number own[N];
#pragma unroll
  for (int j = 0; j < N; j++) own[j] = of[j];
#pragma unroll
  for (int apart = 1; apart < N; apart *= 2)
#pragma unroll
    for (int j = 0; j + apart < N; j += 2 * apart) own[j] = join(own[j], own[j + apart]);
  return own[0];
}
struct Add {
  template <class Number>
  DEVICE Number operator()(Number x, Number y) const { return x + y; }
};
struct Larger {
  DEVICE float operator()(float x, float y) const { return fmaxf(x, y); }
  DEVICE int operator()(int x, int y) const { return max(x, y); }
};
DEVICE float sum_of_lanes(float x) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) x += from_thread(x, apart);
  return x;
}

// Scores of numbers that are NaN or infinite are 0.
DEVICE float sigmoid(float x) { return finite_or(__fdividef(1.0f, 1.0f + __expf(-x)), 0.0f); }

// Of all lanes' x, where they have any: what makes one of them a number, and that a score.
struct Softmax {
  float most, unit;
  bool broken;  // by NaN or infinities: all scores are 0
  template <int N>
  DEVICE Softmax(const float (&x)[N], const bool (&has)[N]) {
    float own[N];
#pragma unroll
    for (int j = 0; j < N; j++) own[j] = has[j] ? x[j] : -infinity();
    most = from_ordered(most_of_lanes(ordered(joined(own, Larger()))));
#pragma unroll
    for (int j = 0; j < N; j++) own[j] = has[j] ? of(x[j]) : 0.0f;
    const float sum = joined(own, Add());
    broken = lanes_with(sum != sum) != 0;
    unit = broken ? 0.0f : __fdividef(1.0f, sum_of_lanes(sum));
  }
  // exp(x - most); what is below 2^-126 is 0.
  DEVICE float of(float x) const { return power_of_2((x - most) * LOG2_E); }
};

// A score but for its unit.
DEVICE float score(const Softmax& softmax, float x) {
  return SCORE == SIGMOID ? sigmoid(x) : softmax.of(x);
}

// A lane's own one of those that may be chosen, and its rank among them.
struct Choice {
  int key = REMOVED, id = -1, rank;
};

// All of them by turns.
DEVICE Choice choose_in_turn(int (&keys)[COLUMNS]) {
  const int lane = threadIdx.x & 31;
  Choice own;
  own.rank = lane;
#pragma unroll 1
  for (int pick = 0; pick < K; pick++) {
    const int best = most_of_lanes(joined(keys, Larger()));
    int id = 0x7FFFFFFF;
#pragma unroll
    for (int j = COLUMNS - 1; j >= 0; j--) id = keys[j] == best ? j * 32 + lane : id;
    id = least_of_lanes(id);
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) keys[j] = j * 32 + lane == id ? REMOVED : keys[j];
    if (lane == pick) own.key = best, own.id = id;
  }
  return own;
}

// ``memory``: 32 places of 8 bytes, for those that may be chosen as numbers of their order, the id
// inverted; and one for each lane's others.
DEVICE Choice choose(int (&keys)[COLUMNS], u32 memory) {
  const int lane = threadIdx.x & 31, most = joined(keys, Larger());
  int above[4] = {0, 0, 0, 0}, among[COLUMNS];
#pragma unroll
  for (int i = 0; i < 32; i++) above[i % 4] += from_lane(most, i) > most;
  const int bound = least_of_lanes(joined(above, Add()) < K ? most : 0x7FFFFFFF);
  const int least = max(bound, MINUS_INFINITY + 1);
#pragma unroll
  for (int j = 0; j < COLUMNS; j++) among[j] = keys[j] >= least;
  const int count = joined(among, Add());
  int place = 0, all = 0;  // of this lane's first one, of all lanes'
#pragma unroll
  for (int bit = 1; bit <= COLUMNS; bit *= 2) {
    const u32 lanes = lanes_with((count & bit) != 0);
    place += __popc(lanes & ((1u << lane) - 1)) * bit;
    all += __popc(lanes) * bit;
  }
  if (all > 32) return choose_in_turn(keys);
  __syncwarp();
#pragma unroll
  for (int j = 0; j < COLUMNS; j++) {
    const u32 to = memory + (among[j] ? place : 32 + lane) * 8;
    store_shared(to, ~(j * 32 + lane), keys[j] ^ 0x80000000u);
    place += among[j];
  }
  store_shared(memory + (lane >= all ? lane : 32 + lane) * 8, 0, 0);
  __syncwarp();
  u32 mine[2];
  load_shared(mine, memory + lane * 8);
  const u64 own = (u64)mine[1] << 32 | mine[0];
  Choice found;
  found.rank = 0;
#pragma unroll 1
  for (int first = 0; first < all; first += 8) {
    int others[8];
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      u32 two[4];
      load_shared(two, memory + (first + i) * 8);
      others[i] = ((u64)two[1] << 32 | two[0]) > own;
      others[i + 1] = ((u64)two[3] << 32 | two[2]) > own;
    }
    found.rank += joined(others, Add());
  }
  if (lane >= all)
    found.rank = lane;
  else
    found.key = (int)(mine[1] ^ 0x80000000u), found.id = (int)~mine[0];
  return found;
}

DEVICE void route(const Arguments& a, i64 token, u32 memory) {
  const int lane = threadIdx.x & 31;
  const i64 row = token * a.stride_row;
  float x[COLUMNS], unit = 1.0f;
  bool has[COLUMNS];
  int keys[COLUMNS];
#pragma unroll
  for (int j = 0; j < COLUMNS; j++) {
    const int id = j * 32 + lane;
    has[j] = id < EXPERTS;
    x[j] = has[j] ? load_as_float<ELEMENT>(a.logits, row + id * a.stride_expert) : 0.0f;
  }
  bool live = true;
  if (PADDING) live = load_past_l1(a.padding + token * a.stride_padding) == 0;
  const Softmax softmax(x, has);
  if (SCORE == SOFTMAX && !AFTER_TOPK) unit = softmax.unit;
#pragma unroll
  for (int j = 0; j < COLUMNS; j++) {
    float choice = AFTER_TOPK ? finite_or(x[j], -infinity()) : score(softmax, x[j]);
    if (BIASED && has[j]) {
      if (!AFTER_TOPK) choice = finite_or(choice * unit, 0.0f);
      choice += load_as_float<BIAS>(a.bias, j * 32 + lane);
      choice = choice == choice ? choice : -infinity();
    }
    keys[j] = has[j] ? key_of(choice) : REMOVED;
  }
  Choice own = choose(keys, memory);
  // Then all are alike.
  if (BY_SCORE && SCORE == SOFTMAX && softmax.broken) own.key = 0, own.id = own.rank = lane;
  const bool chosen[1] = {own.id >= 0 && own.rank < K};
  int id = chosen[0] ? own.id : -1;
  float logit[1] = {of_key(own.key)}, weight = logit[0];
  if (BIASED && chosen[0])
    logit[0] = load_as_float<ELEMENT>(a.logits, row + id * a.stride_expert);
  if (AFTER_TOPK) {
    logit[0] = finite_or(logit[0], -infinity());
    const Softmax last(logit, chosen);
    weight = SCORE == SIGMOID ? sigmoid(logit[0]) : last.of(logit[0]) * last.unit;
  } else if (BIASED) {
    weight = score(softmax, logit[0]);
  }
  weight = chosen[0] ? finite_or(weight * unit, 0.0f) : 0.0f;
  if (RENORMALIZE) {
    const float norm = fmaxf(sum_of_lanes(weight) + a.epsilon, a.floor);
    weight = __fdividef(weight, norm > 0.0f ? norm : 1.0f);
  }
  weight *= a.factor;
  if (EXPERT_SCALE >= 0 && chosen[0]) weight *= load_as_float<EXPERT_SCALE>(a.scale, id);
  if (!live) id = -1, weight = 0.0f;
  if (own.rank >= K) return;
  a.weights[token * K + own.rank] = weight;
  if (ID64)
    ((i64*)a.ids)[token * K + own.rank] = id;
  else
    ((int*)a.ids)[token * K + own.rank] = id;
}

extern "C" __global__ void __launch_bounds__(32) routing_warp(const __grid_constant__ Arguments a) {
  DYNAMIC_SHARED(shared);
  wait_for_previous();
  let_next_begin();
#pragma unroll 1
  for (int token = blockIdx.x; token < a.T; token += gridDim.x)
    route(a, token, shared_address(shared));
}
