// Scales and zero points of a warp's rows: by cp.async to a ring of spans.

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
