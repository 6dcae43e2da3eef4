// The steps of quantized_token.cu: an octet of a tile's 16 rows, which the copy engine brings to a ring
// of the warp's own.

constexpr int PLACE_BYTES = 16 * OCTET_BYTES;

// This warp's steps through both GEMMs, in order, and the ring that they come by.
struct Steps {
  const Arguments& a;
  const Live& live;
  const Part& part;
  u32 ring, full;
  int up_wm, up_kw, down_wm, down_kw, before, all;  // steps of w1, and of both
  int at = 0, stage = 0, phase = 0;

  DEVICE Steps(const Arguments& a, const Live& live, const Part& part, u32 memory)
      : a(a), live(live), part(part) {
    const int warp = threadIdx.x >> 5;
    ring = memory + warp * STAGES * PLACE_BYTES;
    full = memory + RING_BARRIERS_AT + warp * STAGES * 8;
    up_wm = warp / UP_KW, up_kw = warp % UP_KW, down_wm = warp / DOWN_KW, down_kw = warp % DOWN_KW;
    before = max(part.tiles - up_wm + UP_WM - 1, 0) / UP_WM * UP_OWN;
    all = before + (part.pairs * MOST_UNITS - down_wm + DOWN_WM - 1) / DOWN_WM * DOWN_OWN;
  }
  // Asks for a step, by one thread: a box of w1, or of w2 one for each pick of a pair.
  DEVICE void issue(int step, int place) const {
    if (step >= all) return;
    const bool is_up = step < before;
    const int i = is_up ? step / UP_OWN * UP_WM + up_wm + part.tile
                        : (step - before) / DOWN_OWN * DOWN_WM + down_wm;
    const int octet = is_up ? up_kw * UP_OWN + step % UP_OWN
                            : down_kw * DOWN_OWN + (step - before) % DOWN_OWN;
    const int rank = is_up ? i / UP_TILES : i / MOST_UNITS * 2;
    const int row = is_up ? i % UP_TILES * FM : (part.unit + i % MOST_UNITS) * 8;
    // Other blocks may have a unit more; the last pick may have no other beside it.
    const bool none = !is_up && i % MOST_UNITS >= part.units;
    const int boxes = is_up ? 1 : none ? 0 : min(2, live.count - rank);
    const int bytes = is_up ? PLACE_BYTES : PLACE_BYTES / 2;
    const TensorMap& map = is_up ? a.first : a.second;
    expect(full + place * 8, boxes * bytes);
#pragma unroll 1
    for (int j = 0; j < boxes; j++)
      copy_box(ring + place * PLACE_BYTES + j * bytes, map, octet * OCTET_BYTES, row,
               live.experts[rank + j], full + place * 8);
  }
  // The first steps, as far as there is room: those of a tile of w1; those of all its others, when x
  // is there and that tile on its way; those of w2 with all that w2 has, when the last tile is there.
  // Asked for at once, all of them come late; w1's others behind the first tile, memory idles.
  DEVICE void begin_tile() const { begin(0, min(before, UP_OWN)); }
  DEVICE void begin_others() const { begin(UP_OWN, before); }
  DEVICE void begin_down(const Runs& runs) const {
    begin(before, all);
    if ((threadIdx.x & 31) == 0) runs.down(threadIdx.x >> 5);
    __syncwarp();
  }
  DEVICE void begin(int first, int end) const {
    const int lane = threadIdx.x & 31;
    if (lane >= first && lane < min(end, STAGES)) issue(lane, lane);
    __syncwarp();
  }
  // Until the next ``steps`` are here, and where one of them is.
  DEVICE void wait(int steps) const {
    int place = stage, own = phase;
    for (int i = 0; i < steps; i++) {
      wait_barrier(full + place * 8, own);
      place = place + 1 == STAGES ? 0 : place + 1;
      own ^= place == 0;
    }
  }
  DEVICE u32 place(int step) const {
    const int own = stage + step;
    return ring + (own < STAGES ? own : own - STAGES) * PLACE_BYTES;
  }
  // The numbers of the last ``steps`` have been used: sums that need them are there.
  DEVICE void next(int steps) {
    __syncwarp();
    const int lane = threadIdx.x & 31, step = at + lane + STAGES;
    if (lane < steps) issue(step, step % STAGES);
    at += steps, stage += steps;
    if (stage >= STAGES) stage -= STAGES, phase ^= 1;
  }
};
