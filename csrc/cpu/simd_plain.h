// Vectors in the compiler's own vector types: what runs on any CPU, and float64 everywhere.
#pragma once

namespace fused_res::cpu::FUSED_RES_VARIANT {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class A, class Bits>
struct PlainVec {
  static constexpr int width = 8;
  typedef A Lanes __attribute__((vector_size(8 * sizeof(A))));
  typedef Bits Masks __attribute__((vector_size(8 * sizeof(A))));
  typedef uint16_t Shorts __attribute__((vector_size(16)));
  typedef uint32_t Words __attribute__((vector_size(32)));
  typedef float Floats __attribute__((vector_size(32)));

  Lanes v;

  static PlainVec set(A a) { return {Lanes{} + a}; }

  template <class T>
  static PlainVec load(const T* p) {
    if constexpr (sizeof(T) == sizeof(A)) {
      PlainVec to;
      std::memcpy(&to.v, p, sizeof to.v);
      return to;
    } else {
      Shorts s;
      std::memcpy(&s, p, sizeof s);
      return {widen(__builtin_convertvector(s, Words), T{})};
    }
  }

  template <class T>
  static PlainVec load_part(const T* p, int n) {
    T lanes[8] = {};
    std::memcpy(lanes, p, n * sizeof(T));
    return load(lanes);
  }

  template <class T>
  PlainVec store(T* p) const {
    if constexpr (sizeof(T) == sizeof(A)) {
      std::memcpy(p, &v, sizeof v);
      return *this;
    } else {
      const Words rounded = narrow(v, T{});
      const Shorts s = __builtin_convertvector(rounded, Shorts);
      std::memcpy(p, &s, sizeof s);
      return {widen(rounded, T{})};
    }
  }

  template <class T>
  PlainVec store_part(T* p, int n) const {
    T lanes[8];
    const PlainVec rounded = store(lanes);
    std::memcpy(p, lanes, n * sizeof(T));
    return rounded;
  }

  // Lanes where the ReLU lets the gradient pass: those of NaN do.
  uint32_t open() const {
    uint32_t bits = 0;
    for (int i = 0; i < width; ++i) bits |= static_cast<uint32_t>(!(v[i] <= 0)) << i;
    return bits;
  }

  PlainVec relu() const { return {v <= 0 ? Lanes{} : v}; }

  PlainVec keep(uint32_t bits) const {
    const Masks places = {1, 2, 4, 8, 16, 32, 64, 128};
    return {((Masks{} + static_cast<Bits>(bits)) & places) != 0 ? v : Lanes{}};
  }

 private:
  static Floats widen(Words bits, bfloat16) { return bit_cast<Floats>(bits << 16); }

  // Both conversions of float16 are those of the FP16 library (M. Dukhan): scaling moves the exponent, subnormals
  // included.
  static Floats widen(Words bits, half) {
    const Words word = bits << 16, twice = word + word;
    const Floats normal = bit_cast<Floats>((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
    const Floats subnormal = bit_cast<Floats>((twice >> 17) | (126u << 23)) - 0.5f;
    const Words magnitude = twice < (1u << 27) ? bit_cast<Words>(subnormal) : bit_cast<Words>(normal);
    return bit_cast<Floats>((word & 0x80000000u) | magnitude);
  }

  static Words narrow(Floats v, bfloat16) {
    const Words bits = bit_cast<Words>(v);
    const Words rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return v == v ? rounded : Words{} + 0x7FC0u;
  }

  static Words narrow(Floats v, half) {
    const Words bits = bit_cast<Words>(v), twice = bits + bits, sign = bits & 0x80000000u;
    Words bias = twice & 0xFF000000u;
    bias = bias < 0x71000000u ? Words{} + 0x71000000u : bias;
    Floats base = bit_cast<Floats>(bits ^ sign) * 0x1.0p+112f * 0x1.0p-110f;
    base = bit_cast<Floats>((bias >> 1) + 0x07800000u) + base;
    const Words sum = bit_cast<Words>(base);
    const Words magnitude = ((sum >> 13) & 0x7C00u) + (sum & 0xFFFu);
    return (sign >> 16) | (twice > 0xFF000000u ? Words{} + 0x7E00u : magnitude);
  }
};

template <class A, class Bits>
inline PlainVec<A, Bits> operator+(PlainVec<A, Bits> a, PlainVec<A, Bits> b) {
  return {a.v + b.v};
}
template <class A, class Bits>
inline PlainVec<A, Bits> operator-(PlainVec<A, Bits> a, PlainVec<A, Bits> b) {
  return {a.v - b.v};
}
template <class A, class Bits>
inline PlainVec<A, Bits> operator*(PlainVec<A, Bits> a, PlainVec<A, Bits> b) {
  return {a.v * b.v};
}
// Two roundings, the same two wherever it is called: contraction is switched off for these files.
template <class A, class Bits>
inline PlainVec<A, Bits> fma(PlainVec<A, Bits> a, PlainVec<A, Bits> b, PlainVec<A, Bits> c) {
  return {a.v * b.v + c.v};
}

// NaN where either is.
template <class A, class Bits>
inline PlainVec<A, Bits> larger(PlainVec<A, Bits> a, PlainVec<A, Bits> b) {
  return {(b.v > a.v) | (b.v != b.v) ? b.v : a.v};
}

// Lane j of vector i becomes lane i of vector j.
template <class V>
inline void transpose(V (&v)[V::width]) {
  auto lanes = [&](int i) -> auto& { return v[i].v; };
  for (int i = 0; i < V::width; ++i) {
    for (int j = 0; j < i; ++j) {
      const auto kept = lanes(i)[j];
      lanes(i)[j] = lanes(j)[i];
      lanes(j)[i] = kept;
    }
  }
}

}  // namespace fused_res::cpu::FUSED_RES_VARIANT
