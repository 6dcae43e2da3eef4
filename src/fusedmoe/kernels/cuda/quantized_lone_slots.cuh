// The expert of a slot as kernels/ids.py has it.
template <class Arguments>
DEVICE int lone_expert(const Arguments& a, int slot) {
  if (slot >= a.R) return -1;
  i64 id = ID64 ? load_past_l1((const i64*)a.ids + slot) : load_past_l1((const int*)a.ids + slot);
  if (a.map) id = id >= 0 && id < a.num_mapped ? a.map[id] : -1;
  return id >= 0 && id < a.num_local ? (int)id : -1;
}
