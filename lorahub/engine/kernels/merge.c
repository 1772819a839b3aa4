// Low-rank changes of 16-bit weights in one pass: out = round(before + scale * up @ down), ties to even.
//
// Sums are float32.  A weight goes through the cache once, and on the way is noted whether every result is a finite
// number and, where there is a `book`, checksums of the rows before and after and what taking the change off again will
// get wrong.  An element is summed over the rank in order, whatever the shapes, so its bits depend on nothing else.
//
// Plain C with the vector types of GCC and Clang; what AVX-512 has a word for stands in branches of its own.

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define WIDE 1
#define LANES 16
#define HIGH 8
#else
#define WIDE 0
#define LANES 8
#define HIGH 4
#endif
#define PANEL (2 * LANES)

// What the caller has to know: how it lays out `down` and how large its scratch memory is.
const int32_t panel = PANEL;
const int32_t scratch_a_column = HIGH + 1;  // int16, for whole panels and one more
#if WIDE && defined(__AVX512BF16__)
const int32_t has_dots = 1;  // products of bfloat16 factors, two at a time
#else
const int32_t has_dots = 0;
#endif
const int32_t has_float16 = WIDE;

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));
typedef uint64_t v8 __attribute__((vector_size(64)));

#define ALWAYS static inline __attribute__((always_inline))

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
// go on), and differences of the bits as signed bytes (-128: the next of `apart`), modulo 2^16.  See `residual.py`.
struct book {
  uint8_t *steps;
  int8_t *codes;
  int16_t *apart;
  int64_t stepped, coded, wide, last;
  struct checksum before, after;
};

// Where a row differs: `count` differences, whole panels of them, and room for as many places and a panel.  Branches on
// whether one differs would be wrong half of the time, and cost more than all else.
static int64_t places(const int16_t *differences, int64_t count, uint16_t *at) {
  int64_t found = 0;
#if WIDE && defined(__AVX512VBMI2__)
  __m512i here = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10,
                                  9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int64_t c = 0; c < count; c += PANEL, here = _mm512_add_epi16(here, _mm512_set1_epi16(PANEL))) {
    __m512i all = _mm512_loadu_si512(differences + c);
    __mmask32 some = _mm512_test_epi16_mask(all, all);
    _mm512_storeu_si512(at + found, _mm512_maskz_compress_epi16(some, here));
    found += __builtin_popcount(some);
  }
#else
  for (int64_t c = 0; c < count; c += 4) {
    uint64_t four;
    memcpy(&four, differences + c, sizeof four);
    for (int k = 0; four && k < 4; k++) {
      at[found] = (uint16_t)(c + k);
      found += differences[c + k] != 0;
    }
  }
#endif
  return found;
}

#define AT_ONCE (1 << 16)  // columns whose places are 16 bits

static void enter(struct book *b, const int16_t *differences, int64_t first, int64_t columns, uint16_t *at) {
  uint8_t *steps = b->steps + b->stepped;
  int8_t *codes = b->codes + b->coded;
  int64_t last = b->last;
  for (int64_t c = 0; c < columns; c += AT_ONCE, differences += AT_ONCE, first += AT_ONCE) {
    int64_t here = columns - c < AT_ONCE ? columns - c : AT_ONCE;
    int64_t found = places(differences, (here + PANEL - 1) / PANEL * PANEL, at);
    for (int64_t i = 0; i < found && at[i] < here; i++) {
      int64_t place = first + at[i], gap = place - last - 1;
      int16_t difference = differences[at[i]];
      for (; gap >= 255; gap -= 255) *steps++ = 255;
      *steps++ = (uint8_t)gap;
      last = place;
      int far = difference > 127 || difference < -127;
      if (far) b->apart[b->wide++] = difference;
      *codes++ = far ? -128 : (int8_t)difference;
    }
  }
  b->stepped = steps - b->steps, b->coded = codes - b->codes, b->last = last;
}

// ------------------------------------------------------------------------------------------------------ rounding

enum storage { BFLOAT16, FLOAT16 };

ALWAYS vu wide(const uint16_t *at) {
  vh half;
  memcpy(&half, at, sizeof half);
#if WIDE
  return (vu)_mm512_cvtepu16_epi32((__m256i)half);
#else
  return __builtin_convertvector(half, vu);
#endif
}

ALWAYS void put(uint16_t *at, vu value) {
#if WIDE
  vh half = (vh)_mm512_cvtepi32_epi16((__m512i)value);
#else
  vh half = __builtin_convertvector(value, vh);
#endif
  memcpy(at, &half, sizeof half);
}

ALWAYS vu narrow(enum storage s, vf value) {
#if WIDE
  if (s == FLOAT16) return (vu)_mm512_cvtepu16_epi32(_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#endif
  vu bits = (vu)value;
  return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

ALWAYS vf again(enum storage s, vu half) {
#if WIDE
  if (s == FLOAT16) return (vf)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)half));
#endif
  return (vf)(half << 16);
}

ALWAYS vf add(vf weight, float scale, vf product) { return weight + scale * product; }

// -------------------------------------------------------------------------------------------------------- merge

struct job {
  const uint16_t *before;
  uint16_t *out;
  int64_t rows, columns, rank;
  const void *up, *down;  // [rows, rank], [rank, columns up to whole panels]
  float scale;
  int64_t first;      // elements before these, in the unit that the book is about
  struct book *book;  // or NULL
  int16_t *scratch;   // where there is a book
};

ALWAYS vi one_row(enum storage s, int booked, const uint16_t *before, uint16_t *out, float scale, const vf *product,
                  int16_t *differences) {
  vi bad = {0};
  for (int v = 0; v < 2; v++) {
    vu was = wide(before + v * LANES);
    vf total = add(again(s, was), scale, product[v]);
    vu rounded = narrow(s, total);
    bad |= (s == BFLOAT16 ? 0x7F7F7FFF : 0x477FEFFF) - ((vi)total & 0x7FFFFFFF);
    if (booked) put((uint16_t *)differences + v * LANES, was - narrow(s, add(again(s, rounded), -scale, product[v])));
    put(out + v * LANES, rounded);
  }
  return bad;
}

ALWAYS vf times(int dots, uint32_t left, vu right, vf sum) {
#if WIDE && defined(__AVX512BF16__)
  if (dots) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(left), (__m512bh)right);
#endif
  float factor;
  memcpy(&factor, &left, 4);
  return sum + factor * (vf)right;
}

ALWAYS void multiply(int dots, const uint32_t *const *left, const uint32_t *right, int64_t count, vf product[HIGH][2]) {
#if WIDE
#define EACH(row) row(0) row(1) row(2) row(3) row(4) row(5) row(6) row(7)
#else
#define EACH(row) row(0) row(1) row(2) row(3)
#endif
#define BEGIN(i) vf a##i = {0}, b##i = {0}; const uint32_t *l##i = left[i];
#define GO_ON(i) a##i = times(dots, l##i[k], one, a##i); b##i = times(dots, l##i[k], other, b##i);
#define END(i) product[i][0] = a##i; product[i][1] = b##i;
  EACH(BEGIN)
  for (int64_t k = 0; k < count; k++, right += PANEL) {
    vu one, other;
    memcpy(&one, right, sizeof one);
    memcpy(&other, right + LANES, sizeof other);
    EACH(GO_ON)
  }
  EACH(END)
}

ALWAYS int merge(enum storage s, int dots, int booked, const struct job *given) {
  const struct job j = *given;
  int64_t wide = (j.columns + PANEL - 1) / PANEL * PANEL, pairs = dots ? (j.rank + 1) / 2 : j.rank;
  const uint32_t *up = j.up, *down = j.down;
  uint16_t *at = (uint16_t *)j.scratch + HIGH * wide;
  vi bad = {0};
  for (int64_t r = 0; r < j.rows; r += HIGH) {
    int high = j.rows - r < HIGH ? (int)(j.rows - r) : HIGH;
    const uint32_t *left[HIGH];
    for (int i = 0; i < HIGH; i++) left[i] = up + (r + (i < high ? i : 0)) * pairs;
    const uint16_t *before = j.before + r * j.columns;
    uint16_t *out = j.out + r * j.columns;
    if (booked) add_bytes(&j.book->before, (const uint8_t *)before, high * j.columns * 2);
    for (int64_t c = 0; c < wide; c += PANEL) {
      vf product[HIGH][2];
      multiply(dots, left, down + c * pairs, pairs, product);
      int64_t here = j.columns - c < PANEL ? j.columns - c : PANEL;
      for (int i = 0; i < high; i++) {
        int64_t at = i * j.columns + c;
        if (booked) __builtin_prefetch(before + at + HIGH * j.columns, 1);  // the checksum comes to it first
        if (here == PANEL) {
          bad |= one_row(s, booked, before + at, out + at, j.scale, product[i], j.scratch + i * wide + c);
        } else {
          uint16_t edge[PANEL] = {0};
          memcpy(edge, before + at, here * 2);
          bad |= one_row(s, booked, edge, edge, j.scale, product[i], j.scratch + i * wide + c);
          memcpy(out + at, edge, here * 2);
        }
      }
    }
    if (booked) {
      for (int i = 0; i < high; i++) enter(j.book, j.scratch + i * wide, j.first + (r + i) * j.columns, j.columns, at);
      add_bytes(&j.book->after, (const uint8_t *)out, high * j.columns * 2);
    }
  }
  int32_t any = 0;
  for (int i = 0; i < LANES; i++) any |= bad[i];
  return any >= 0;
}

void keep(const struct job *j) {  // rows that nothing is done to
  add_bytes(&j->book->before, (const uint8_t *)j->before, j->rows * j->columns * 2);
  add_bytes(&j->book->after, (const uint8_t *)j->before, j->rows * j->columns * 2);
}

void restore(const struct book *b, uint16_t *out) {
  const int16_t *apart = b->apart;
  int64_t place = -1, code = 0;
  for (int64_t i = 0; i < b->stepped; i++) {
    place += b->steps[i];
    if (b->steps[i] == 255) continue;
    place += 1;
    out[place] += (uint16_t)(b->codes[code] == -128 ? *apart++ : b->codes[code]);
    code++;
  }
}

#define MERGE(name, s, dots)                                                                                        \
  int name(const struct job *j) { return j->book ? merge(s, dots, 1, j) : merge(s, dots, 0, j); }

MERGE(merge_bfloat16, BFLOAT16, 0)
#if WIDE
MERGE(merge_float16, FLOAT16, 0)
MERGE(merge_bfloat16_dots, BFLOAT16, 1)
#endif
