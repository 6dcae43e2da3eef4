// Scales and zero points of a warp's rows: by cp.async to a ring of spans, and where in it they lie.

struct Spans {
  u32 to;
  int span = 0, slot = 0;

  // Eight threads take PITCH bytes of a row, 32 at most, from the word on in which a span begins.
  DEVICE void copy(const Ahead& ahead, u32 first, const u8* base, int unit, bool loose) const {
    const int group = first_group(ahead.at.k), lane = ahead.p.lane, word = lane % 8 * 4;
    const u8* all = base + (ahead.expert * (i64)EXPERT_SCALES + group) * unit + word;
#pragma unroll
    for (int i = 0; i < MT * 4; i++) {
      const int row = i * 4 + lane / 8;
      const u8* one =
          all + scale_row(ahead.p, ahead.at.task, i / 4, row % 16) * (SCALE_STRIDE * unit);
      const int miss = loose ? (int)(u64)one & 3 : 0;
      if (word < PITCH)
        copy4(first + row * PITCH + word, one - miss, word < (SCALE_STRIDE - group) * unit + miss);
    }
  }

  DEVICE void issue(const Ahead& ahead) {
    if (!RINGED) return;
    if (ahead.at.k == ahead.p.k_begin) span = 0;
    if (span == 0) {
      copy(ahead, to + slot * SPAN_BYTES, ahead.tasks.a.scale, SCALE_BYTES, SCALE_LOOSE);
      if (ZERO)
        copy(ahead, to + (SPANS + slot) * SPAN_BYTES, ahead.tasks.a.zero, 1, ZERO_LOOSE);
      slot = turn(slot, SPANS);
    }
    span = turn(span, SPAN);
  }
};

// Addresses for this thread's rows, less what precedes their span.
struct Scales {
  u32 spans;
  int span = 0, slot = 0;
  u32 at[MT][2], zeros[MT][2];

  DEVICE void step(const Place& p, const Tasks& tasks, int task, int k) {
    if (!RINGED) return;
    if (k == p.k_begin) span = 0;
    if (span == 0) {
      const int group = first_group(k);
      const bool loose = SCALE_LOOSE || ZERO_LOOSE;
      const int first = loose ? (int)(tasks.expert(task) * (i64)EXPERT_SCALES) + group : 0;
#pragma unroll
      for (int i = 0; i < MT * 2; i++) {
        const int mt = i / 2, r = i % 2 * 8 + p.g;
        const int low = first + scale_row(p, task, mt, r) * SCALE_STRIDE;
        const u32 row = spans + slot * SPAN_BYTES + (mt * 16 + r) * PITCH;
        at[mt][i % 2] = row + (SCALE_LOOSE ? low * SCALE_BYTES & 3 : 0) - group * SCALE_BYTES;
        zeros[mt][i % 2] = row + SPANS * SPAN_BYTES + (ZERO_LOOSE ? low & 3 : 0) - group;
      }
      slot = turn(slot, SPANS);
    }
    span = turn(span, SPAN);
  }

  DEVICE float factor(int mt, int half, int group) const {
    return RINGED && !SCALED ? stored_scale(at[mt][half] + group * SCALE_BYTES) : 1.0f;
  }
  DEVICE float zero(int mt, int half, int group) const {
    return ZERO ? stored_middle(zeros[mt][half] + group) : 8.0f;
  }
};
