// The end of an item of quantized_rows.cu: sums of warps along the columns, the rows of out.

// Of a tile's, the first feature whose sums this thread has at the end.
DEVICE int own_feature(const Place& p) { return ALTERNATING ? p.g / 2 + p.g % 2 * 4 : p.g; }

// The end of an item: what it needs from global memory, and the rows of out.
struct Ends {
  int item = 0, expert, split, slots[NT][2];
  u32 bias[2];  // of one tile

  template <class Rows>
  DEVICE void take_block(const Place& p, const Arguments& a, int block, int groups) {
    if (BIAS) expert = expert_of(a, block);
    split = groups;
#pragma unroll
    for (int i = 0; i < (LONE ? 0 : NT * 2); i++) {
      const int column = Rows::column(p, i % 2);
      slots[i / 2][i % 2] = column < 8 / split ? slot_of(a, block, i / 2 * 8 + column) : -1;
    }
  }
  // Of a column of this thread's sums.
  DEVICE int slot_at(const Place& p, int n, int i) const {
    if (LONE) return p.t == 0 && i == 0 ? item / TILES : -1;
    return slots[n][i];
  }
  DEVICE void load(const Place& p, const Arguments& a, int mt) {
    if (!BIAS) return;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int f = item % TILES * FT + (p.wm * MT + mt) * FM + own_feature(p);
      const int row = f * ROW_STEP + i * (GATED ? SHARD_STEP : 8 * ROW_STEP);
      bias[i] = bits_at<BIAS - 1>(a.bias, expert * EXPERT_ROWS + row);
    }
  }
  DEVICE void store(const Place& p, const Arguments& a, int mt, int n, float (&v)[4]) const {
    if (SPLITTING) {
      if (LONE) v[0] += v[1], v[2] += v[3];
#pragma unroll
      for (int apart = 1; apart < 4; apart *= 2) {
        if (!LONE && split * apart < 4) continue;
#pragma unroll
        for (int i = 0; i < 4; i += LONE ? 2 : 1) v[i] += from_thread(v[i], apart);
      }
    }
    const int f = item % TILES * FT + (p.wm * MT + mt) * FM + own_feature(p);
    if (ALTERNATING) {
      // Gate and up of a feature are in neighbouring rows: each of two threads gives half of its own.
      const bool odd = p.g % 2;
      const float low = from_thread(odd ? v[0] : v[2], 4), high = from_thread(odd ? v[1] : v[3], 4);
      if (odd)
        v[0] = low, v[1] = high;
      else
        v[2] = low, v[3] = high;
    }
    const int part = item / TILES % PARTS;
    float added[2] = {0.0f, 0.0f};
#pragma unroll
    for (int half = 0; half < 2; half++)
      if (BIAS && part == 0) {
        // Here and not where they were asked for: a warp would wait for them there.
        u32 bits = bias[half];
        hold(bits);
        added[half] = number<BIAS - 1>(bits);
      }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int slot = slot_at(p, n, i);
      if (slot < 0 || slot >= a.R) continue;
      const float low = fmaf(v[i], UNIT, added[0]), high = fmaf(v[2 + i], UNIT, added[1]);
      store_features(a, slot * PARTS + part, f, low, high);
    }
  }
};

// Sums of KW warps, two tiles' in turns.
struct Parts {
  float4* sums;
  u32 full, empty;
  int buffer = 0, phase = 0, owner = 0;  // of the tile that is multiplied

  DEVICE u32 full_at(const Place& p, int buffer) const { return full + (buffer * WM + p.wm) * 8; }
  DEVICE u32 empty_at(const Place& p, int buffer) const { return empty + (buffer * WM + p.wm) * 8; }
  DEVICE float4* at(const Place& p, int buffer, int i, int kw) const {
    return sums + (((buffer * WM + p.wm) * NT + i) * KW + kw) * 32 + p.lane;
  }
  DEVICE void write(const Place& p, const float (&acc)[NT][4]) {
    wait_barrier(empty_at(p, buffer), phase ^ 1);
#pragma unroll
    for (int i = 0; i < NT; i++) {
      const float(&own)[4] = acc[i];
      *at(p, buffer, i, p.kw) = make_float4(own[0], own[1], own[2], own[3]);
    }
    __syncwarp();
    if (p.lane == 0) arrive(full_at(p, buffer));
  }
  DEVICE void next() {
    buffer ^= 1;
    phase ^= buffer == 0;
    owner = turn(owner, KW);
  }
  // Whether this warp adds up the tile before.
  DEVICE bool mine(const Place& p) const { return owner == turn(p.kw, KW); }
  DEVICE void finish(const Place& p, const Arguments& a, const Ends& before, int mt) const {
    const int own = buffer ^ 1;
    wait_barrier(full_at(p, own), buffer == 0 ? phase ^ 1 : phase);
#pragma unroll
    for (int i = 0; i < NT; i++) {
      const float4 first = *at(p, own, i, 0);
      float v[4] = {first.x, first.y, first.z, first.w};
#pragma unroll
      for (int j = 1; j < KW; j++) {
        const float4 part = *at(p, own, i, j);
        v[0] += part.x, v[1] += part.y, v[2] += part.z, v[3] += part.w;
      }
      before.store(p, a, mt, i, v);
    }
    __syncwarp();
    if (p.lane == 0) arrive(empty_at(p, own));
  }
};
