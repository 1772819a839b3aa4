// Low-rank changes of weights in one pass: out = round(before + scale * up @ down), ties to even.
//
// Sums are float32 where 16 bits are stored, and float64 where float32 is.  A weight goes through the cache once, and on
// the way is noted whether every result is a finite number and, where there is a `book`, checksums of the rows before and
// after and what taking the change off again will get wrong.  An element is summed over the rank in order, whatever the
// shapes, so its bits depend on nothing else.
//
// Plain C with the vector types of GCC and Clang; what AVX-512 has a word for stands in branches of its own.

#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "pairs of 16-bit numbers are taken for words whose lower half comes first"
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define WIDE 1
#define VECTOR 64  // bytes
#define HIGH 8     // rows at a time
#else
#define WIDE 0
#define VECTOR 32
#define HIGH 4
#endif
#define WORDS (VECTOR / 4)
#define AT_ONCE (1 << 16)  // columns whose places are 16 bits

typedef uint32_t vu __attribute__((vector_size(VECTOR)));
typedef float vf __attribute__((vector_size(VECTOR)));
typedef float hf __attribute__((vector_size(VECTOR / 2)));
typedef double vd __attribute__((vector_size(VECTOR)));
typedef uint64_t v8 __attribute__((vector_size(64)));

#define ALWAYS static inline __attribute__((always_inline))

// What is stored.  A vector of it is a panel: 2 * WORDS numbers of 16 bits, or WORDS of float32.
enum storage { BFLOAT16, FLOAT16, FLOAT32 };
#define BYTES(s) ((s) == FLOAT32 ? 4 : 2)
#define PANEL(s) (VECTOR / BYTES(s))

// What the caller has to know: how it lays out `down`, and how large its scratch memory is.
const int32_t panel_bytes = VECTOR;
const int32_t scratch_rows = HIGH;
#if WIDE && defined(__AVX512BF16__)
const int32_t has_dots = 1;  // products of bfloat16 factors, two at a time
#else
const int32_t has_dots = 0;
#endif
const int32_t has_float16 = WIDE;

// ---------------------------------------------------------------------------------------------------- checksums

// As in `checksum.py`: words in a table of COLUMNS, its rows and columns weighed by odd numbers.
#define COLUMNS 64
#define ROWS (1 << 14)
#define LINE (8 * COLUMNS)
#define MULTIPLIER 0x5851F42D4C957F2Dull

struct checksum {
  const uint64_t *weights;  // ROWS of rows, then COLUMNS of columns
  uint64_t total, row, bytes, part;
  uint64_t columns[COLUMNS];
  uint8_t rest[LINE];
  uint64_t resting;
};

static void close_part(struct checksum *c) {
  uint64_t columns = 0;
  for (int i = 0; i < COLUMNS; i++) {
    columns += c->columns[i] * c->weights[ROWS + i];
    c->columns[i] = 0;
  }
  c->total = c->total * MULTIPLIER + c->part + columns;
  c->part = c->row = 0;
}

ALWAYS void lines(struct checksum *c, const uint8_t *bytes, int64_t count) {
  while (count) {
    int64_t some = ROWS - (int64_t)c->row < count ? ROWS - (int64_t)c->row : count;
    v8 columns[8], part = {0};
    memcpy(columns, c->columns, sizeof columns);
    for (int64_t i = 0; i < some; i++, bytes += LINE) {
      v8 sum = {0};
      for (int k = 0; k < 8; k++) {
        v8 words;
        memcpy(&words, bytes + 64 * k, 64);
        columns[k] += words;
        sum += words;
      }
      part += sum * c->weights[c->row + i];
    }
    memcpy(c->columns, columns, sizeof columns);
    for (int k = 0; k < 8; k++) c->part += part[k];
    c->row += some;
    count -= some;
    if (c->row == ROWS) close_part(c);
  }
}

static void add_bytes(struct checksum *c, const uint8_t *bytes, int64_t count) {
  c->bytes += count;
  if (c->resting) {
    int64_t some = LINE - (int64_t)c->resting < count ? LINE - (int64_t)c->resting : count;
    memcpy(c->rest + c->resting, bytes, some);
    c->resting += some, bytes += some, count -= some;
    if (c->resting < LINE) return;
    lines(c, c->rest, 1);
    c->resting = 0;
  }
  lines(c, bytes, count / LINE);
  memcpy(c->rest, bytes + count / LINE * LINE, count % LINE);
  c->resting = count % LINE;
}

uint64_t checksum_end(struct checksum *c) {
  if (c->row) close_part(c);
  if (!c->resting) return c->total;
  uint64_t last = 0;
  for (uint64_t i = 0; i < c->resting; i++) last += c->rest[i] * c->weights[i];
  return c->total * MULTIPLIER + last + c->bytes;
}

// --------------------------------------------------------------------------------------------------------- book

// What `-scale` gives back, against what was there: the places that differ as steps from one to the next, less one (255:
// go on), and differences of the bits as signed bytes (-128: the next of `apart`), modulo their number.  See `residual.py`.
struct book {
  uint8_t *steps;
  int8_t *codes;
  void *apart;  // as wide as what is stored
  int64_t stepped, coded, wide, last;
  struct checksum before, after;
};

// Where a row differs from what was there, and by how much.
struct row {
  uint16_t *at;  // the column, modulo AT_ONCE
  void *by;      // as wide as what is stored
  int64_t count;
};

// Enter where two panels differ, of which `here` columns count.  Branches on whether one differs would be wrong half of
// the time, and cost more than all else.
ALWAYS void compare(enum storage s, struct row *row, vu was, vu back, int64_t column, int64_t here) {
#if WIDE && defined(__AVX512VBMI2__)
  const __m512i steps = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12,
                                         11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __mmask32 some = s == FLOAT32 ? _mm512_cmpneq_epi32_mask((__m512i)was, (__m512i)back)
                                : _mm512_cmpneq_epi16_mask((__m512i)was, (__m512i)back);
  if (here < PANEL(s)) some &= (1u << here) - 1;
  __m512i places = _mm512_add_epi16(steps, _mm512_set1_epi16((int16_t)column)), differences;
  if (s == FLOAT32) differences = _mm512_maskz_compress_epi32((__mmask16)some, (__m512i)(was - back));
  else differences = _mm512_maskz_compress_epi16(some, _mm512_sub_epi16((__m512i)was, (__m512i)back));
  _mm512_storeu_si512(row->at + row->count, _mm512_maskz_compress_epi16(some, places));
  _mm512_storeu_si512((uint8_t *)row->by + BYTES(s) * row->count, differences);
  row->count += __builtin_popcount(some);
#else
  uint8_t ours[VECTOR], theirs[VECTOR];
  memcpy(ours, &was, VECTOR);
  memcpy(theirs, &back, VECTOR);
  for (int64_t c = 0; c < here; c++) {
    uint32_t one = 0, other = 0;
    memcpy(&one, ours + c * BYTES(s), BYTES(s));
    memcpy(&other, theirs + c * BYTES(s), BYTES(s));
    if (c * BYTES(s) % 8 == 0 && !memcmp(ours + c * BYTES(s), theirs + c * BYTES(s), 8)) {
      c += 8 / BYTES(s) - 1;
      continue;
    }
    uint32_t difference = one - other;
    row->at[row->count] = (uint16_t)(column + c);
    memcpy((uint8_t *)row->by + BYTES(s) * row->count, &difference, BYTES(s));
    row->count += one != other;
  }
#endif
}

ALWAYS void enter(enum storage s, struct book *b, const struct row *row, int64_t first) {
  uint8_t *steps = b->steps + b->stepped;
  int8_t *codes = b->codes + b->coded;
  int64_t last = b->last;
  for (int64_t i = 0; i < row->count; i++) {
    int64_t place = first + row->at[i], gap = place - last - 1;
    int32_t difference = s == FLOAT32 ? ((int32_t *)row->by)[i] : ((int16_t *)row->by)[i];
    for (; gap >= 255; gap -= 255) *steps++ = 255;
    *steps++ = (uint8_t)gap;
    last = place;
    int far = difference > 127 || difference < -127;
    if (far && s == FLOAT32) ((int32_t *)b->apart)[b->wide++] = difference;
    if (far && s != FLOAT32) ((int16_t *)b->apart)[b->wide++] = (int16_t)difference;
    *codes++ = far ? -128 : (int8_t)difference;
  }
  b->stepped = steps - b->steps, b->coded = codes - b->codes, b->last = last;
}

// ------------------------------------------------------------------------------------------------------ rounding

// A panel in the dtype of the sums: of 16 bits its even and its odd numbers, as the words hold them in their lower and
// upper halves; of float32 its first and its second half.
struct sums { vu one, other; };

ALWAYS struct sums widen(enum storage s, vu stored) {
  if (s == FLOAT32) {
#if WIDE
    hf half[2] = {(hf)_mm512_castps512_ps256((__m512)stored), (hf)_mm512_extractf32x8_ps((__m512)stored, 1)};
#else
    hf half[2];
    memcpy(half, &stored, VECTOR);
#endif
    return (struct sums){(vu)__builtin_convertvector(half[0], vd), (vu)__builtin_convertvector(half[1], vd)};
  }
#if WIDE
  if (s == FLOAT16)
    return (struct sums){(vu)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)stored)),
                         (vu)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)(stored >> 16)))};
#endif
  return (struct sums){stored << 16, stored & 0xFFFF0000};
}

ALWAYS vu nearest_bfloat16(vu bits) {  // in the upper half; what is no number stays none
  return (bits + 0x7FFF + ((bits >> 16) & 1)) | (vu)((vf)bits != (vf)bits);
}

ALWAYS vu narrow(enum storage s, struct sums p) {
  if (s == FLOAT32) {
    hf half[2] = {__builtin_convertvector((vd)p.one, hf), __builtin_convertvector((vd)p.other, hf)};
#if WIDE
    return (vu)_mm512_insertf32x8(_mm512_castps256_ps512((__m256)half[0]), (__m256)half[1], 1);
#else
    vu both;
    memcpy(&both, half, VECTOR);
    return both;
#endif
  }
#if WIDE
  if (s == FLOAT16) {
    vu even = (vu)_mm512_cvtepu16_epi32(_mm512_cvtps_ph((__m512)p.one, _MM_FROUND_TO_NEAREST_INT));
    vu odd = (vu)_mm512_cvtepu16_epi32(_mm512_cvtps_ph((__m512)p.other, _MM_FROUND_TO_NEAREST_INT));
    return even | odd << 16;
  }
#endif
#if WIDE && defined(__AVX512BF16__)
  // The instruction makes zero of what is below the normal numbers: where there is a zero, integers decide.
  const __m512i mixed = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)p.other, (__m512)p.one);
  if (__builtin_expect(!_mm512_testn_epi16_mask(both, _mm512_set1_epi16(0x7FFF)), 1))
    return (vu)_mm512_permutexvar_epi16(mixed, both);
#endif
  return nearest_bfloat16(p.one) >> 16 | (nearest_bfloat16(p.other) & 0xFFFF0000);
}

// Has the uppermost bit of a number set where that is none, or is infinite.
ALWAYS vu unbounded(enum storage s, vu stored) {
  if (s == FLOAT32) return (stored & 0x7FFFFFFF) + (0x80000000 - 0x7F800000);
  const uint32_t room = s == FLOAT16 ? 0x8000 - 0x7C00 : 0x8000 - 0x7F80;
  return (stored & 0x7FFF7FFF) + room * 0x10001;
}

ALWAYS vu multiply_add(enum storage s, vu one, vu other, vu sum) {
  if (s == FLOAT32) return (vu)((vd)sum + (vd)one * (vd)other);
  return (vu)((vf)sum + (vf)one * (vf)other);
}

ALWAYS vu all(enum storage s, double value) {
  if (s == FLOAT32) return (vu)(value - (vd){0});
  return (vu)((float)value - (vf){0});
}

ALWAYS struct sums add(enum storage s, struct sums p, vu scale, struct sums product) {
  return (struct sums){multiply_add(s, scale, product.one, p.one), multiply_add(s, scale, product.other, p.other)};
}

// ------------------------------------------------------------------------------------------------------- product

// Where `dots`, factors are pairs of bfloat16, and otherwise they have the dtype of the sums.
ALWAYS vu times(enum storage s, int dots, const uint8_t *left, vu right, vu sum) {
  if (s == FLOAT32) {
    double factor;
    memcpy(&factor, left, sizeof factor);
    return (vu)((vd)sum + factor * (vd)right);
  }
#if WIDE && defined(__AVX512BF16__)
  if (dots) {
    uint32_t pair;
    memcpy(&pair, left, sizeof pair);
    return (vu)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)right);
  }
#endif
  float factor;
  memcpy(&factor, left, sizeof factor);
  return (vu)((vf)sum + factor * (vf)right);
}

// One panel of HIGH rows of up @ down.
ALWAYS void multiply(enum storage s, int dots, const uint8_t *const *left, const uint8_t *right, int64_t count,
                     struct sums product[HIGH]) {
#if WIDE
#define EACH(row) row(0) row(1) row(2) row(3) row(4) row(5) row(6) row(7)
#else
#define EACH(row) row(0) row(1) row(2) row(3)
#endif
#define BEGIN(i) vu a##i = {0}, b##i = {0}; const uint8_t *l##i = left[i];
#define GO_ON(i) a##i = times(s, dots, l##i + k * each, one, a##i); b##i = times(s, dots, l##i + k * each, other, b##i);
#define END(i) product[i] = (struct sums){a##i, b##i};
  const int64_t each = s == FLOAT32 ? 8 : 4;
  EACH(BEGIN)
  for (int64_t k = 0; k < count; k++, right += 2 * VECTOR) {
    vu one, other;
    memcpy(&one, right, VECTOR);
    memcpy(&other, right + VECTOR, VECTOR);
    EACH(GO_ON)
  }
  EACH(END)
}

// -------------------------------------------------------------------------------------------------------- merge

struct job {
  const uint8_t *before;
  uint8_t *out;
  int64_t rows, columns, rank;
  const uint8_t *up, *down;  // [rows, rank], [panels, rank, two vectors]
  double scale;
  int64_t first;      // elements before these, in the unit that the book is about
  struct book *book;  // or NULL
  uint8_t *scratch;   // where there is a book
};

ALWAYS vu one_panel(enum storage s, const uint8_t *before, uint8_t *out, double scale, struct sums product, struct row *row,
                    int64_t column, int64_t here) {
  vu was;
  memcpy(&was, before, VECTOR);
  vu now = narrow(s, add(s, widen(s, was), all(s, scale), product));
  if (row) compare(s, row, was, narrow(s, add(s, widen(s, now), all(s, -scale), product)), column, here);
  memcpy(out, &now, VECTOR);
  return unbounded(s, now);
}

ALWAYS int64_t pairs_of(int dots, int64_t rank) { return dots ? (rank + 1) / 2 : rank; }

ALWAYS int merge(enum storage s, int dots, int booked, const struct job *given) {
  const struct job j = *given;
  const int64_t of_row = j.columns * BYTES(s), pairs = pairs_of(dots, j.rank), of_factors = pairs * (s == FLOAT32 ? 8 : 4);
  const int64_t room = (of_row + VECTOR - 1) / VECTOR * PANEL(s) + PANEL(s);  // differences in a row, and one more panel
  const int at_once = booked && j.columns > AT_ONCE ? 1 : HIGH;
  struct row rows[HIGH];
  for (int i = 0; i < HIGH && booked; i++) {
    rows[i].at = (uint16_t *)j.scratch + i * room;
    rows[i].by = j.scratch + (HIGH * 2 + i * BYTES(s)) * room;
  }
  vu bad = {0};
  for (int64_t r = 0; r < j.rows; r += at_once) {
    int high = j.rows - r < at_once ? (int)(j.rows - r) : at_once;
    const uint8_t *left[HIGH];
    for (int i = 0; i < HIGH; i++) left[i] = j.up + (r + (i < high ? i : 0)) * of_factors;
    const uint8_t *before = j.before + r * of_row;
    uint8_t *out = j.out + r * of_row;
    if (booked) add_bytes(&j.book->before, before, high * of_row);
    for (int64_t band = 0; band < j.columns; band += at_once == 1 ? AT_ONCE : j.columns) {
      int64_t end = at_once == 1 && band + AT_ONCE < j.columns ? band + AT_ONCE : j.columns;
      for (int i = 0; i < high && booked; i++) rows[i].count = 0;
      for (int64_t c = band; c < end; c += PANEL(s)) {
        struct sums product[HIGH];
        multiply(s, dots, left, j.down + c / PANEL(s) * pairs * 2 * VECTOR, pairs, product);
        int64_t here = end - c < PANEL(s) ? end - c : PANEL(s);
        for (int i = 0; i < high; i++) {
          const uint8_t *from = before + i * of_row + c * BYTES(s);
          uint8_t *to = out + i * of_row + c * BYTES(s);
          struct row *row = booked ? rows + i : NULL;
          if (booked) __builtin_prefetch(from + HIGH * of_row, 1);  // the checksum comes to it first
          if (here == PANEL(s)) {
            bad |= one_panel(s, from, to, j.scale, product[i], row, c - band, PANEL(s));
          } else {
            uint8_t edge[VECTOR] = {0};
            memcpy(edge, from, here * BYTES(s));
            bad |= one_panel(s, edge, edge, j.scale, product[i], row, c - band, here);
            memcpy(to, edge, here * BYTES(s));
          }
        }
      }
      for (int i = 0; i < high && booked; i++) enter(s, j.book, rows + i, j.first + (r + i) * j.columns + band);
    }
    if (booked) add_bytes(&j.book->after, out, high * of_row);
  }
  uint32_t any = 0;
  for (int i = 0; i < WORDS; i++) any |= bad[i];
  return !(any & (s == FLOAT32 ? 0x80000000 : 0x80008000));
}

// ---------------------------------------------------------------------------------------------------------- look

// What merging would do to some rows, and nothing is written: see `Change` in `sums.py`.
struct sizes { double before, added, kept, lost; };

ALWAYS double total(enum storage s, vu sum) {
  double found = 0;
  for (int i = 0; i < WORDS; i++) {
    if (s != FLOAT32) found += ((vf)sum)[i];
    else if (i < WORDS / 2) found += ((vd)sum)[i];
  }
  return found;
}

ALWAYS void look(enum storage s, int dots, const struct job *given, int64_t step, struct sizes *sizes) {
  const struct job j = *given;
  const int64_t of_row = j.columns * BYTES(s), pairs = pairs_of(dots, j.rank), of_factors = pairs * (s == FLOAT32 ? 8 : 4);
  *sizes = (struct sizes){0};
  for (int64_t r = 0; r < j.rows; r += HIGH * step) {
    const uint8_t *left[HIGH];
    int high = 0;
    for (int i = 0; i < HIGH; i++) {
      high += r + i * step < j.rows;
      left[i] = j.up + (r + (i < high ? i * step : 0)) * of_factors;
    }
    vu before = {0}, added = {0}, kept = {0}, lost = {0};
    for (int64_t c = 0; c < j.columns; c += PANEL(s)) {
      struct sums product[HIGH];
      multiply(s, dots, left, j.down + c / PANEL(s) * pairs * 2 * VECTOR, pairs, product);
      int64_t here = j.columns - c < PANEL(s) ? j.columns - c : PANEL(s);
      for (int i = 0; i < high; i++) {
        vu stored = {0};
        const uint8_t *from = j.before + (r + i * step) * of_row + c * BYTES(s);
        if (here == PANEL(s)) memcpy(&stored, from, VECTOR);
        else memcpy(&stored, from, here * BYTES(s));
        const vu scale = all(s, j.scale), less = all(s, -1);
        struct sums was = widen(s, stored), none = {{0}, {0}}, more = add(s, none, scale, product[i]);
        struct sums effect = add(s, widen(s, narrow(s, add(s, was, scale, product[i]))), less, was);
        struct sums rest = add(s, effect, less, more);
#define SUM(to, x, y) to = multiply_add(s, x.one, y.one, multiply_add(s, x.other, y.other, to))
        SUM(before, was, was);
        SUM(added, more, more);
        SUM(kept, effect, more);
        SUM(lost, rest, rest);
      }
    }
    sizes->before += total(s, before), sizes->added += total(s, added);
    sizes->kept += total(s, kept), sizes->lost += total(s, lost);
  }
}

// ----------------------------------------------------------------------------------------------------- from outside

#define MERGE(name, s, dots)                                                                                       \
  int merge_##name(const struct job *j) { return j->book ? merge(s, dots, 1, j) : merge(s, dots, 0, j); }          \
  void look_##name(const struct job *j, int64_t step, struct sizes *sizes) { look(s, dots, j, step, sizes); }

MERGE(float32, FLOAT32, 0)
MERGE(bfloat16, BFLOAT16, 0)
#if WIDE
MERGE(float16, FLOAT16, 0)
MERGE(bfloat16_dots, BFLOAT16, 1)
#endif

void keep(const struct job *j, int64_t bytes) {  // rows that nothing is done to
  add_bytes(&j->book->before, j->before, bytes);
  add_bytes(&j->book->after, j->before, bytes);
}

#define RESTORE(name, word)                                                              \
  void restore_##name(const struct book *b, word *out) {                                 \
    const word *apart = b->apart;                                                        \
    int64_t place = -1, code = 0;                                                        \
    for (int64_t i = 0; i < b->stepped; i++) {                                           \
      place += b->steps[i];                                                              \
      if (b->steps[i] == 255) continue;                                                  \
      place += 1;                                                                        \
      out[place] += b->codes[code] == -128 ? *apart++ : (word)b->codes[code];            \
      code++;                                                                            \
    }                                                                                    \
  }

RESTORE(2, uint16_t)
RESTORE(4, uint32_t)
