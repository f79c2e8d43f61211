// Which weights of prefix_attention dropout keeps. The same on every device. On the CPU included once per instruction
// set, inside a namespace of its own, so nothing is included here.

// Random bits of the weights of one row: a hash of the seed and of each weight's own place (row, head, key), so that
// forward and backward find the same ones, whatever the tiles, the threads and the vectors.
struct DropoutBits {
  uint32_t first, second;

  DropoutBits() = default;
  // `row` is token * H + head, the token counted over all segments.
  C10_HOST_DEVICE DropoutBits(uint64_t seed, int64_t row) {
    uint64_t x = seed + static_cast<uint64_t>(row + 1) * 0x9e3779b97f4a7c15u;  // SplitMix64
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    first = static_cast<uint32_t>(x);
    second = static_cast<uint32_t>(x >> 32);
  }

  // 31 bits of each key, the prefix's counted from 0 and the segment's after them, by Chris Wellons' "triple32". With
  // two rounds instead of three weights of a row correlate (1e-3).
  template <typename X>
  C10_HOST_DEVICE X of(X key) const {
    key = (key ^ first) * 0xed5ad4bbu + second;
    key = (key ^ key >> 11) * 0xac4c1b51u;
    key = (key ^ key >> 15) * 0x31848babu;
    return key >> 1;
  }
};

// What has fewer bits is dropped.
C10_HOST_DEVICE inline int32_t least_kept(double dropout_p) { return static_cast<int32_t>(dropout_p * 2147483648.0); }
