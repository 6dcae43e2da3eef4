// Where scales and zero points of a warp's rows lie in their ring of spans.

// Addresses for this thread's rows, less what precedes their span.
struct Scales {
  u32 spans;
  int span = 0, slot = 0;
  u32 at[MT][2], zeros[MT][2];

  DEVICE void step(const Place& p, const Tasks& tasks, int task, int k) {
    if (!RINGED) return;
    if (k == p.k_begin) span = 0;
    place(p, tasks, task, k, spans);
  }
  // For a caller that keeps the address of the spans, and begins every task with span 0 itself.
  DEVICE void place(const Place& p, const Tasks& tasks, int task, int k, u32 ring) {
    if (span == 0) {
      const int group = first_group(k);
      const bool loose = SCALE_LOOSE || ZERO_LOOSE;
      const int first = loose ? (int)(tasks.expert(task) * (i64)EXPERT_SCALES) + group : 0;
#pragma unroll
      for (int i = 0; i < MT * 2; i++) {
        const int mt = i / 2, r = i % 2 * 8 + p.g;
        const int low = first + scale_row(p, task, mt, r) * SCALE_STRIDE;
        const u32 row = ring + slot * SPAN_BYTES + (mt * 16 + r) * PITCH;
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
