// What a processor has words for: vectors, and what the merge does to whole vectors at a time.
//
// Plain C with the vector types of GCC and Clang is what every machine gets; AVX-512, AVX2 and NEON have branches where
// theirs is better.

#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "pairs of 16-bit numbers are taken for words whose lower half comes first"
#endif

// Bytes of a vector, and rows of a product at a time: two sums of each row, two vectors of `down` and a number of `up`
// are in registers.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define AVX512 1
#define VECTOR 64
#define HIGH 8
#define EACH(row) row(0) row(1) row(2) row(3) row(4) row(5) row(6) row(7)
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define AVX2 1
#define VECTOR 32
#define HIGH 6
#define EACH(row) row(0) row(1) row(2) row(3) row(4) row(5)
#else
#define VECTOR 32
#define HIGH 4
#define EACH(row) row(0) row(1) row(2) row(3)
#ifdef __aarch64__
#include <arm_neon.h>
#define NEON 1
#endif
#endif
#define WORDS (VECTOR / 4)

#if AVX512 || AVX2 || NEON
#define HAS_FLOAT16 1
#else
#define HAS_FLOAT16 0
#endif
#if AVX512 && defined(__AVX512BF16__)
#define HAS_BFLOAT16 1
#else
#define HAS_BFLOAT16 0
#endif
#if AVX512 && defined(__AVX512VBMI2__)
#define HAS_COMPRESSION 1
#else
#define HAS_COMPRESSION 0
#endif

#define ALWAYS static inline __attribute__((always_inline))
#define NEVER __attribute__((noinline))

typedef uint32_t vu __attribute__((vector_size(VECTOR)));
typedef uint16_t vh __attribute__((vector_size(VECTOR)));
typedef uint64_t vq __attribute__((vector_size(VECTOR)));
typedef float vf __attribute__((vector_size(VECTOR)));
typedef double vd __attribute__((vector_size(VECTOR)));
typedef float hf __attribute__((vector_size(VECTOR / 2)));

// What is stored.  A vector of it is a panel: 2 * WORDS numbers of 16 bits, or WORDS of float32.
enum storage { BFLOAT16, FLOAT16, FLOAT32 };
#define BYTES(s) ((s) == FLOAT32 ? 4 : 2)
#define PANEL(s) (VECTOR / BYTES(s))

// --------------------------------------------------------------------------------------------------- conversions

struct halves { hf first, second; };

ALWAYS struct halves halves(vu numbers) {
  struct halves h;
#if AVX512
  h.first = (hf)_mm512_castps512_ps256((__m512)numbers), h.second = (hf)_mm512_extractf32x8_ps((__m512)numbers, 1);
#elif AVX2
  h.first = (hf)_mm256_castps256_ps128((__m256)numbers), h.second = (hf)_mm256_extractf128_ps((__m256)numbers, 1);
#else
  memcpy(&h, &numbers, VECTOR);
#endif
  return h;
}

ALWAYS vu whole(struct halves h) {
#if AVX512
  return (vu)_mm512_insertf32x8(_mm512_castps256_ps512((__m256)h.first), (__m256)h.second, 1);
#elif AVX2
  return (vu)_mm256_insertf128_ps(_mm256_castps128_ps256((__m128)h.first), (__m128)h.second, 1);
#else
  vu numbers;
  memcpy(&numbers, &h, VECTOR);
  return numbers;
#endif
}

#if HAS_FLOAT16
// Float16 in the lower halves of words, whose upper halves are zero, as float32; and back, to the nearest.
ALWAYS vu from_float16(vu words) {
#if AVX512
  return (vu)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)words));
#elif AVX2
  __m128i low = _mm256_castsi256_si128((__m256i)words), high = _mm256_extracti128_si256((__m256i)words, 1);
  return (vu)_mm256_cvtph_ps(_mm_packus_epi32(low, high));
#elif NEON
  uint32x4_t parts[2];
  memcpy(parts, &words, VECTOR);
  float32x4_t wide[2];
  for (int i = 0; i < 2; i++) wide[i] = vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(parts[i])));
  memcpy(&words, wide, VECTOR);
  return words;
#endif
}

ALWAYS vu to_float16(vu numbers) {
#if AVX512
  return (vu)_mm512_cvtepu16_epi32(_mm512_cvtps_ph((__m512)numbers, _MM_FROUND_TO_NEAREST_INT));
#elif AVX2
  return (vu)_mm256_cvtepu16_epi32(_mm256_cvtps_ph((__m256)numbers, _MM_FROUND_TO_NEAREST_INT));
#elif NEON
  float32x4_t parts[2];
  memcpy(parts, &numbers, VECTOR);
  uint32x4_t words[2];
  for (int i = 0; i < 2; i++) words[i] = vmovl_u16(vreinterpret_u16_f16(vcvt_f16_f32(parts[i])));
  memcpy(&numbers, words, VECTOR);
  return numbers;
#endif
}
#endif

#if HAS_BFLOAT16
// The sum and the products of pairs of bfloat16.
ALWAYS vu add_pairs(vu sum, uint32_t pair, vu pairs) {
  return (vu)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)pairs);
}

// Even and odd numbers to the nearest as a panel; 0, with nothing done, where one is or would become zero: the
// instruction makes zero of what is below the normal numbers.
ALWAYS int to_bfloat16(vu even, vu odd, vu *panel) {
  const __m512i mixed = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  if (__builtin_expect(_mm512_testn_epi16_mask(both, _mm512_set1_epi16(0x7FFF)), 0)) return 0;
  *panel = (vu)_mm512_permutexvar_epi16(mixed, both);
  return 1;
}
#endif

// The larger of words without a sign, each of its pair.
ALWAYS vu larger(vu one, vu other) {
#if AVX512
  return (vu)_mm512_max_epu32((__m512i)one, (__m512i)other);
#elif AVX2
  return (vu)_mm256_max_epu32((__m256i)one, (__m256i)other);
#else
  vu first = (vu)(one > other);
  return (one & first) | (other & ~first);
#endif
}

// The upper halves of words as even and odd numbers of a panel.
ALWAYS vu upper_halves(vu even, vu odd) {
#if AVX2
  return (vu)_mm256_blend_epi16((__m256i)(even >> 16), (__m256i)odd, 0xAA);
#else
  return even >> 16 | (odd & 0xFFFF0000);
#endif
}

// -------------------------------------------------------------------------------------------------- differences

// Where a row differs from what was there, and by how much.
struct row {
  uint16_t *at;  // the column, modulo 1 << 16
  uint8_t *by;   // as wide as what is stored
  int64_t count;
};

// Which numbers of two panels differ, the first as the lowest bit.
ALWAYS uint32_t different(enum storage s, vu was, vu back) {
#if AVX512
  if (s == FLOAT32) return _mm512_cmpneq_epi32_mask((__m512i)was, (__m512i)back);
  return _mm512_cmpneq_epi16_mask((__m512i)was, (__m512i)back);
#elif AVX2
  if (s == FLOAT32) return 255 & ~_mm256_movemask_ps((__m256)_mm256_cmpeq_epi32((__m256i)was, (__m256i)back));
  __m256i same = _mm256_cmpeq_epi16((__m256i)was, (__m256i)back);
  return 0xFFFF & ~_mm_movemask_epi8(_mm_packs_epi16(_mm256_castsi256_si128(same), _mm256_extracti128_si256(same, 1)));
#elif NEON
  const uint32x4_t fours = {1, 2, 4, 8};
  const uint16x8_t eights = {1, 2, 4, 8, 16, 32, 64, 128};
  uint16x8_t apart[2];
  vu both = was ^ back;
  memcpy(apart, &both, VECTOR);
  uint32_t some = 0;
  for (int i = 0; i < 2; i++) {
    uint32x4_t words = vreinterpretq_u32_u16(apart[i]);
    if (s == FLOAT32) some |= vaddvq_u32(vandq_u32(vtstq_u32(words, words), fours)) << 4 * i;
    else some |= (uint32_t)vaddvq_u16(vandq_u16(vtstq_u16(apart[i], apart[i]), eights)) << 8 * i;
  }
  return some;
#else
  uint8_t apart[VECTOR];
  vu both = was ^ back;
  memcpy(apart, &both, VECTOR);
  uint32_t some = 0;
  for (int i = 0; i < PANEL(s); i++) {
    uint32_t bits = 0;
    memcpy(&bits, apart + BYTES(s) * i, BYTES(s));
    some |= (uint32_t)(bits != 0) << i;
  }
  return some;
#endif
}

// Panels' numbers less others, each in the place of its own.
ALWAYS vu less(enum storage s, vu one, vu other) {
  if (s == FLOAT32) return one - other;
  return (vu)((vh)one - (vh)other);
}

#if (AVX512 || AVX2 || NEON) && !HAS_COMPRESSION
typedef uint8_t eight __attribute__((vector_size(16)));  // eight numbers of 16 bits

// Where the bytes of the chosen ones of eight numbers of 16 bits are, and of four of 32, in order.
static eight of_eight[256], of_four[16];

static void choose(eight *orders, int count, int bytes) {
  for (int chosen = 0; chosen < 1 << count; chosen++)
    for (int i = 0, to = 0; i < count; i++)
      for (int byte = 0; byte < bytes && chosen >> i & 1; byte++) orders[chosen][to++] = (uint8_t)(bytes * i + byte);
}

__attribute__((constructor)) static void choose_all(void) {
  choose(of_eight, 8, 2);
  choose(of_four, 4, 4);
}

ALWAYS eight in_order(eight numbers, eight order) {
#if NEON
  return (eight)vqtbl1q_u8((uint8x16_t)numbers, (uint8x16_t)order);
#else
  return (eight)_mm_shuffle_epi8((__m128i)numbers, (__m128i)order);
#endif
}
#endif

// Enter the chosen ones of a panel's differences, which begins at a column.  Branches on whether one is chosen would be
// wrong half of the time, and cost more than all else.  As much as a panel is written; the next goes over what is too much.
ALWAYS void note(enum storage s, struct row *row, uint32_t chosen, vu differences, int64_t column) {
  uint16_t *at = row->at + row->count;
  uint8_t *by = row->by + BYTES(s) * row->count;
  row->count += __builtin_popcount(chosen);
#if HAS_COMPRESSION
  const __m512i steps = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12,
                                         11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512i places = _mm512_add_epi16(steps, _mm512_set1_epi16((int16_t)column));
  _mm512_storeu_si512(at, _mm512_maskz_compress_epi16(chosen, places));
  _mm512_storeu_si512(by, s == FLOAT32 ? _mm512_maskz_compress_epi32((__mmask16)chosen, (__m512i)differences)
                                       : _mm512_maskz_compress_epi16(chosen, (__m512i)differences));
#elif AVX512 || AVX2 || NEON
  typedef uint16_t places __attribute__((vector_size(16)));
  const places steps = {0, 1, 2, 3, 4, 5, 6, 7};
  eight parts[VECTOR / 16];
  memcpy(parts, &differences, VECTOR);
  for (int k = 0; k < PANEL(s); k += 8, chosen >>= 8) {
    eight found = in_order((eight)(steps + (uint16_t)(column + k)), of_eight[chosen & 255]);
    memcpy(at, &found, 16);
    at += __builtin_popcount(chosen & 255);
    for (int half = 0; half < BYTES(s) / 2; half++) {
      uint32_t here = s == FLOAT32 ? chosen >> 4 * half & 15 : chosen & 255;
      found = in_order(parts[k * BYTES(s) / 16 + half], s == FLOAT32 ? of_four[here] : of_eight[here]);
      memcpy(by, &found, 16);
      by += BYTES(s) * __builtin_popcount(here);
    }
  }
#else
  uint8_t all[VECTOR];
  memcpy(all, &differences, VECTOR);
  for (int i = 0; i < PANEL(s); i++) {
    *at = (uint16_t)(column + i);
    memcpy(by, all + BYTES(s) * i, BYTES(s));
    at += chosen >> i & 1, by += (chosen >> i & 1) * BYTES(s);
  }
#endif
}
