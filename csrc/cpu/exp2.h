// 2^x for x <= 127, of one float or of a vector of them. It includes nothing: a file that is compiled once per
// instruction set includes it below the pragma that selects the set, inside a namespace of its own.

// A polynomial in the fraction, of relative error 2e-9 before rounding, with the exponent added as bits. What is below
// 2^-126 becomes 0, NaN stays NaN. Branchless, so that loops over it vectorise.
template <typename Bits, typename X>
inline X exp2_bounded(X x) {
  const float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which stands in the low bits
  x = x < -127.0f ? X{} - 127.0f : x;
  const X shifted = x + kMagic;
  const X f = x - (shifted - kMagic);  // in [-0.5, 0.5]
  X p = f * 0.000153458121613f + 0.00133999311772f;
  p = p * f + 0.00961848895633f;
  p = p * f + 0.0555032877711f;
  p = p * f + 0.240226468906f;
  p = p * f + 0.693147205737f;
  p = p * f + 1.0f;
  return p * __builtin_bit_cast(X, (__builtin_bit_cast(Bits, shifted) << 23) + (127 << 23));
}
