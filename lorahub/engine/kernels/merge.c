// Low-rank changes of weights in one pass: out = round(before + scale * up @ down), ties to even.
//
// Sums are float32 where 16 bits are stored, and float64 where float32 is.  A weight goes through the cache once, and on
// the way is noted whether every result is a finite number and, where there is a `book`, checksums of the rows before and
// after and what taking the change off again will get wrong.  An element is summed over the rank in order, whatever the
// shapes, so its bits depend on nothing else.
//
// What differs from processor to processor is in `machine.h`.

#include "machine.h"

#define AT_ONCE (1 << 16)  // columns whose places are 16 bits

// What the caller has to know: how it lays out `down`, and how large its scratch memory is.
const int32_t panel_bytes = VECTOR;
const int32_t scratch_rows = HIGH;
const int32_t has_dots = HAS_BFLOAT16;  // products of bfloat16 factors, two at a time
const int32_t has_float16 = HAS_FLOAT16;

// ---------------------------------------------------------------------------------------------------- checksums

// As in `checksum_torch.py`: words in a table of COLUMNS, its rows and columns weighed by odd numbers.
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

ALWAYS vq words(const uint8_t *bytes, int line, int k) {
  vq found;
  memcpy(&found, bytes + line * LINE + k * VECTOR, VECTOR);
  return found;
}

ALWAYS void lines(struct checksum *c, const uint8_t *bytes, int64_t count) {
  const int each = LINE / VECTOR;
  while (count) {
    const uint64_t *weights = c->weights + c->row;
    int64_t some = ROWS - (int64_t)c->row < count ? ROWS - (int64_t)c->row : count, i = 0;
    vq columns[LINE / VECTOR], part = {0};
    memcpy(columns, c->columns, sizeof columns);
    for (; i + 4 <= some; i += 4, bytes += 4 * LINE) {
      vq s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
#pragma GCC unroll 16
      for (int k = 0; k < each; k++) {
        vq w0 = words(bytes, 0, k), w1 = words(bytes, 1, k), w2 = words(bytes, 2, k), w3 = words(bytes, 3, k);
        columns[k] += (w0 + w1) + (w2 + w3);
        s0 += w0, s1 += w1, s2 += w2, s3 += w3;
      }
      part += (s0 * weights[i] + s1 * weights[i + 1]) + (s2 * weights[i + 2] + s3 * weights[i + 3]);
    }
    for (; i < some; i++, bytes += LINE) {
      vq sum = {0};
      for (int k = 0; k < each; k++) {
        columns[k] += words(bytes, 0, k);
        sum += words(bytes, 0, k);
      }
      part += sum * weights[i];
    }
    memcpy(c->columns, columns, sizeof columns);
    for (int k = 0; k < VECTOR / 8; k++) c->part += part[k];
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

uint64_t checksum(const uint8_t *bytes, int64_t count, const uint64_t *weights) {
  struct checksum c = {.weights = weights};
  add_bytes(&c, bytes, count);
  return checksum_end(&c);
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

#define NEAR 254  // the longest step that needs no other before it
#define SOME 16

// Of SOME differences, in order, the steps from one to the next and the codes; 0 where one is too far or too large.
ALWAYS int enter_some(enum storage s, const uint16_t *at, const void *by, int64_t i, uint8_t *steps, int8_t *codes) {
  const int16_t *small = by;
  const int32_t *large = by;
  uint16_t gaps[SOME], odd = 0;
  for (int k = 0; k < SOME; k++) {
    gaps[k] = (uint16_t)(at[i + k] - at[i + k - 1] - 1);
    odd |= gaps[k] > NEAR;
    if (s == FLOAT32) odd |= (uint32_t)large[i + k] + 127 > 254;
    else odd |= (uint16_t)((uint16_t)small[i + k] + 127) > 254;
  }
  if (odd) return 0;
  for (int k = 0; k < SOME; k++) {
    steps[k] = (uint8_t)gaps[k];
    codes[k] = (int8_t)(s == FLOAT32 ? large[i + k] : small[i + k]);
  }
  return 1;
}

ALWAYS void enter(enum storage s, struct book *b, const struct row *row, int64_t first) {
  const uint16_t *at = row->at;
  const void *by = row->by;
  uint8_t *steps = b->steps + b->stepped;
  int8_t *codes = b->codes + b->coded;
  int64_t last = b->last, wide = b->wide;
  for (int64_t i = 0, count = row->count; i < count;) {
    if (i && i + SOME <= count && enter_some(s, at, by, i, steps, codes)) {
      i += SOME, steps += SOME, codes += SOME;
      last = first + at[i - 1];
      continue;
    }
    int64_t place = first + at[i], gap = place - last - 1;
    int32_t difference = s == FLOAT32 ? ((const int32_t *)by)[i] : ((const int16_t *)by)[i];
    for (; gap > NEAR; gap -= NEAR + 1) *steps++ = NEAR + 1;
    *steps++ = (uint8_t)gap;
    last = place;
    int far = difference > 127 || difference < -127;
    if (far && s == FLOAT32) ((int32_t *)b->apart)[wide++] = difference;
    if (far && s != FLOAT32) ((int16_t *)b->apart)[wide++] = (int16_t)difference;
    *codes++ = far ? -128 : (int8_t)difference;
    i++;
  }
  b->stepped = steps - b->steps, b->coded = codes - b->codes, b->wide = wide, b->last = last;
}

// ------------------------------------------------------------------------------------------------------ rounding

// A panel in the dtype of the sums: of 16 bits its even and its odd numbers, as the words hold them in their lower and
// upper halves; of float32 its first and its second half.
struct sums { vu one, other; };

ALWAYS struct sums widen(enum storage s, vu stored) {
  if (s == FLOAT32) {
    struct halves h = halves(stored);
    return (struct sums){(vu)__builtin_convertvector(h.first, vd), (vu)__builtin_convertvector(h.second, vd)};
  }
#if HAS_FLOAT16
  if (s == FLOAT16) return (struct sums){from_float16(stored & 0xFFFF), from_float16(stored >> 16)};
#endif
  return (struct sums){stored << 16, stored & 0xFFFF0000};
}

ALWAYS vu nearest_bfloat16(vu bits) {  // in the upper half; what is no number may become one
  return bits + 0x7FFF + ((bits >> 16) & 1);
}

ALWAYS vu narrow(enum storage s, struct sums p) {
  if (s == FLOAT32)
    return whole((struct halves){__builtin_convertvector((vd)p.one, hf), __builtin_convertvector((vd)p.other, hf)});
#if HAS_FLOAT16
  if (s == FLOAT16) return to_float16(p.one) | to_float16(p.other) << 16;
#endif
#if HAS_BFLOAT16
  vu panel;
  if (to_bfloat16(p.one, p.other, &panel)) return panel;
#endif
  return upper_halves(nearest_bfloat16(p.one), nearest_bfloat16(p.other));
}

// Has the uppermost bit of a number set where that is none, or is infinite, or becomes so when it is rounded; of
// bfloat16 before that, for then it could be hidden.
ALWAYS vu unbounded(enum storage s, struct sums p, vu rounded) {
  if (s == BFLOAT16) return larger(p.one & 0x7FFFFFFF, p.other & 0x7FFFFFFF) + (0x80000000 - 0x7F7F8000);
  if (s == FLOAT16) return (rounded & 0x7FFF7FFF) + (0x8000 - 0x7C00) * 0x10001;
  return (rounded & 0x7FFFFFFF) + (0x80000000 - 0x7F800000);
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
  if (dots) {
#if HAS_BFLOAT16
    uint32_t pair;
    memcpy(&pair, left, sizeof pair);
    return add_pairs(sum, pair, right);
#endif
  }
  float factor;
  memcpy(&factor, left, sizeof factor);
  return (vu)((vf)sum + factor * (vf)right);
}

// One panel of HIGH rows of up @ down.
ALWAYS void multiply_here(enum storage s, int dots, const uint8_t *const *left, const uint8_t *right, int64_t count,
                          struct sums product[HIGH]) {
#define BEGIN(i) vu a##i = {0}, b##i = {0}; const uint8_t *l##i = left[i];
#define GO_ON(i) a##i = times(s, dots, l##i + k * each, one, a##i); b##i = times(s, dots, l##i + k * each, other, b##i);
#define END(i) product[i] = (struct sums){a##i, b##i};
  const int64_t each = s == FLOAT32 ? 8 : 4;
  EACH(BEGIN)
  for (int64_t k = 0; k < count; k++, right += 2 * VECTOR) {
    vu one, other;
    memcpy(&one, right, VECTOR);
    memcpy(&other, right + VECTOR, VECTOR);
#if AVX2
    __asm__("" : "+x"(one), "+x"(other));  // loads are what there is least of: one each, and not one for each row
#endif
    EACH(GO_ON)
  }
  EACH(END)
}

// In functions of their own: what a caller wants to keep in registers would drive sums out of them.
#define MULTIPLY(name, s, dots)                                                                                      \
  static NEVER void multiply_##name(const uint8_t *const *left, const uint8_t *right, int64_t count,                 \
                                    struct sums product[HIGH]) {                                                     \
    multiply_here(s, dots, left, right, count, product);                                                             \
  }

MULTIPLY(float32, FLOAT32, 0)
MULTIPLY(short, BFLOAT16, 0)
MULTIPLY(dots, BFLOAT16, HAS_BFLOAT16)

ALWAYS void multiply(enum storage s, int dots, const uint8_t *const *left, const uint8_t *right, int64_t count,
                     struct sums product[HIGH]) {
  if (s == FLOAT32) multiply_float32(left, right, count, product);
  else if (dots) multiply_dots(left, right, count, product);
  else multiply_short(left, right, count, product);
}

// -------------------------------------------------------------------------------------------------------- merge

struct job {
  const uint8_t *before;
  uint8_t *out;
  int64_t rows, columns, rank;
  const uint8_t *up, *down;  // [rows, rank], [panels, rank, two vectors]
  double scale;
  const double *by_row;  // [rows, 2]: what a weight and its product are multiplied with; or NULL: by 1 and scale
  int64_t first;         // elements before these, in the unit that the book is about
  struct book *book;     // or NULL
  uint8_t *scratch;      // where there is a book
};

enum way { PLAIN, BOOKED, BY_ROW };

ALWAYS vu load(enum storage s, const uint8_t *from, int64_t here) {
  vu found = {0};
  memcpy(&found, from, here == PANEL(s) ? VECTOR : here * BYTES(s));
  return found;
}

// Fold `high` rows of a panel, of which `here` columns count, and note what goes wrong on the way back.  All rows go one
// step before any goes the next: within a row every step waits for the one before.
ALWAYS vu fold(enum storage s, enum way way, const struct job *j, int64_t r, int high, int64_t c, int64_t here,
               const struct sums *product, struct row *rows, int64_t column) {
  const int64_t of_row = j->columns * BYTES(s), at = r * of_row + c * BYTES(s);
  const uint8_t *before = j->before + at;
  uint8_t *out = j->out + at;
  vu bad = {0}, was[HIGH], now[HIGH], back[HIGH];
  const vu there = all(s, j->scale), again = all(s, -j->scale);
#pragma GCC unroll 8
  for (int i = 0; i < high; i++) {
    if (way == BOOKED) __builtin_prefetch(before + (HIGH + i) * of_row, 1);  // the checksum comes to it first
    was[i] = load(s, before + i * of_row, here);
    struct sums start = widen(s, was[i]);
    const double *own = way == BY_ROW ? j->by_row + 2 * (r + i) : NULL;
    if (way == BY_ROW) start = add(s, (struct sums){{0}, {0}}, all(s, own[0]), start);
    struct sums sum = add(s, start, way == BY_ROW ? all(s, own[1]) : there, product[i]);
    now[i] = narrow(s, sum);
    bad |= unbounded(s, sum, now[i]);
    memcpy(out + i * of_row, &now[i], here == PANEL(s) ? VECTOR : here * BYTES(s));
  }
  if (way != BOOKED) return bad;
#pragma GCC unroll 8
  for (int i = 0; i < high; i++) back[i] = narrow(s, add(s, widen(s, now[i]), again, product[i]));
#pragma GCC unroll 8
  for (int i = 0; i < high; i++) {
    uint32_t some = different(s, was[i], back[i]);
    if (here < PANEL(s)) some &= (1u << here) - 1;
    note(s, rows + i, some, less(s, was[i], back[i]), column);
  }
  return bad;
}

ALWAYS int64_t pairs_of(int dots, int64_t rank) { return dots ? (rank + 1) / 2 : rank; }

ALWAYS int merge(enum storage s, int dots, enum way way, const struct job *given) {
  const struct job j = *given;
  const int booked = way == BOOKED;
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
    if (booked) add_bytes(&j.book->before, j.before + r * of_row, high * of_row);
    for (int64_t band = 0; band < j.columns; band += at_once == 1 ? AT_ONCE : j.columns) {
      int64_t end = at_once == 1 && band + AT_ONCE < j.columns ? band + AT_ONCE : j.columns;
      for (int i = 0; i < high && booked; i++) rows[i].count = 0;
      for (int64_t c = band; c < end; c += PANEL(s)) {
        struct sums product[HIGH];
        multiply(s, dots, left, j.down + c / PANEL(s) * pairs * 2 * VECTOR, pairs, product);
        int64_t here = end - c < PANEL(s) ? end - c : PANEL(s);
        int full = high == HIGH && here == PANEL(s);
        bad |= full ? fold(s, way, &j, r, HIGH, c, PANEL(s), product, rows, c - band)
                    : fold(s, way, &j, r, high, c, here, product, rows, c - band);
      }
      for (int i = 0; i < high && booked; i++) enter(s, j.book, rows + i, j.first + (r + i) * j.columns + band);
    }
    if (booked) add_bytes(&j.book->after, j.out + r * of_row, high * of_row);
  }
  uint32_t any = 0;
  for (int i = 0; i < WORDS; i++) any |= bad[i];
  return !(any & (s == FLOAT16 ? 0x80008000 : 0x80000000));
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
        vu stored = load(s, j.before + (r + i * step) * of_row + c * BYTES(s), here);
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

// ------------------------------------------------------------------------------------------------------- squares

// Of every row, the sum of the squares of what merging would make of it before that is rounded.
ALWAYS void squares(enum storage s, int dots, const struct job *given, double *found) {
  const struct job j = *given;
  const int64_t of_row = j.columns * BYTES(s), pairs = pairs_of(dots, j.rank), of_factors = pairs * (s == FLOAT32 ? 8 : 4);
  const int64_t band = 64 * PANEL(s);  // as many as are summed in the dtype of the sums
  for (int64_t r = 0; r < j.rows; r += HIGH) {
    int high = j.rows - r < HIGH ? (int)(j.rows - r) : HIGH;
    const uint8_t *left[HIGH];
    for (int i = 0; i < HIGH; i++) left[i] = j.up + (r + (i < high ? i : 0)) * of_factors;
    for (int i = 0; i < high; i++) found[r + i] = 0;
    for (int64_t start = 0; start < j.columns; start += band) {
      int64_t end = j.columns - start < band ? j.columns : start + band;
      vu sums[HIGH] = {{0}};
      for (int64_t c = start; c < end; c += PANEL(s)) {
        struct sums product[HIGH];
        multiply(s, dots, left, j.down + c / PANEL(s) * pairs * 2 * VECTOR, pairs, product);
        int64_t here = end - c < PANEL(s) ? end - c : PANEL(s);
        for (int i = 0; i < high; i++) {
          vu stored = load(s, j.before + (r + i) * of_row + c * BYTES(s), here);
          struct sums made = add(s, widen(s, stored), all(s, j.scale), product[i]);
          SUM(sums[i], made, made);
        }
      }
      for (int i = 0; i < high; i++) found[r + i] += total(s, sums[i]);
    }
  }
}

// ----------------------------------------------------------------------------------------------------- from outside

#define MERGE(name, s, dots)                                                                                       \
  int merge_##name(const struct job *j) {                                                                          \
    if (j->book) return merge(s, dots, BOOKED, j);                                                                 \
    return j->by_row ? merge(s, dots, BY_ROW, j) : merge(s, dots, PLAIN, j);                                       \
  }                                                                                                                \
  void look_##name(const struct job *j, int64_t step, struct sizes *sizes) { look(s, dots, j, step, sizes); }      \
  void squares_##name(const struct job *j, double *found) { squares(s, dots, j, found); }

MERGE(float32, FLOAT32, 0)
MERGE(bfloat16, BFLOAT16, 0)
#if HAS_FLOAT16
MERGE(float16, FLOAT16, 0)
#endif
#if HAS_BFLOAT16
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
