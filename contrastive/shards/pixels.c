/* Crop, resize and mirror many small images, and change their colours: what augment.py does one by one with torch.
 *
 * The results are the same, byte for byte (tests/shards/test_compiled.py). Built and called by compiled.py.
 */

#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { AHEAD = 1 << 15 }; /* bytes that are fetched while the image before is at work: they stay in the cache */
enum { LANES = 16, TOGETHER = 4 }; /* sums at a time: of 16 bytes of a row, or of a pixel's 4 bytes in 4 rows */

/* What pixels along one axis are made of: pixel i of first[i] and those behind it, by `pairs` pairs of weights over
 * 2^bits; those beyond the last one that counts are 0. */
typedef struct {
  int pairs, bits;
  int32_t *first, *weights; /* a pair in one: the second times 2^16, plus the first without its sign */
} Taps;

/* Keys' cubic (1981) with a = -1/2, as Pillow's and torch's antialiased resize. */
static double cubic(double x) {
  const double a = -0.5;
  x = fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * a;
  return 0.0;
}

static int most_taps(int in, int out) {
  const double scale = (double)in / out;
  return (int)ceil(scale >= 1.0 ? 2.0 * scale : 2.0) * 2 + 1;
}

/* Integer weights, the finest that the largest of them leaves in 16 bits. Returns 0, or 1 without memory. */
static int make_taps(int in, int out, Taps *taps) {
  const int most = most_taps(in, out);
  const double scale = (double)in / out;
  const double support = scale >= 1.0 ? 2.0 * scale : 2.0, shrink = scale >= 1.0 ? 1.0 / scale : 1.0;
  double *exact = calloc((size_t)out * (most + 1), sizeof *exact), largest = 0.0;
  taps->first = malloc(out * sizeof *taps->first);
  int longest = 1;
  for (int i = 0; i < out && exact && taps->first; ++i) {
    const double center = scale * (i + 0.5);
    const int64_t first = (int64_t)(center - support + 0.5), last = (int64_t)(center + support + 0.5);
    const int begin = first > 0 ? (int)first : 0, wanted = (int)(last < in ? last : in) - begin;
    const int count = wanted < most ? wanted : most;
    double total = 0.0, *own = exact + (size_t)i * (most + 1);
    for (int j = 0; j < count; ++j) total += own[j] = cubic((j + begin - center + 0.5) * shrink);
    for (int j = 0; j < count; ++j) {
      if (total != 0.0) own[j] /= total;
      if (own[j] > largest) largest = own[j];
    }
    taps->first[i] = begin;
    if (count > longest) longest = count;
  }
  taps->bits = 0;
  while (taps->bits < 22 && (int)(0.5 + largest * (1 << (taps->bits + 1))) < (1 << 15)) ++taps->bits;
  taps->pairs = (longest + 1) / 2;
  taps->weights = malloc((size_t)out * taps->pairs * sizeof *taps->weights);
  const int failed = !exact || !taps->first || !taps->weights;
  for (int i = 0; i < out && !failed; ++i)
    for (int j = 0; j < taps->pairs; ++j) {
      int rounded[2];
      for (int k = 0; k < 2; ++k) {
        const double scaled = exact[(size_t)i * (most + 1) + 2 * j + k] * (1 << taps->bits);
        rounded[k] = (int)(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
      }
      taps->weights[(size_t)i * taps->pairs + j] = (uint16_t)rounded[0] | rounded[1] * 65536;
    }
  free(exact);
  return failed;
}

/* 16 numbers, cut off at 0 and 255. */
static inline __m128i to_bytes(__m256i low, __m256i high) {
  /* packing saturates, half by half of a register: put the halves in order */
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
  return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

/* LANES sums of pairs of runs of bytes, `apart` from each other, each times its weight; 0 ... 255, rounded. */
static inline __m128i weigh(const uint8_t *from, size_t apart, const int32_t *weights, int pairs, int bits) {
  __m256i low = _mm256_set1_epi32(1 << (bits - 1)), high = low;
  for (int j = 0; j < pairs; ++j, from += 2 * apart) { /* one instruction sums pairs of products */
    const __m128i one = _mm_loadu_si128((const __m128i *)from);
    const __m128i other = _mm_loadu_si128((const __m128i *)(from + apart));
    const __m256i both = _mm256_set1_epi32(weights[j]);
    low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(one, other)), both));
    high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_unpackhi_epi8(one, other)), both));
  }
  const __m128i shift = _mm_cvtsi32_si128(bits);
  return to_bytes(_mm256_sra_epi32(low, shift), _mm256_sra_epi32(high, shift));
}

/* A crop of an image whose rows are `pitch` bytes: groups of TOGETHER rows, whose pixels of a column lie together.
 * Rows and columns behind it, which weigh nothing, stay what they are. */
static void cut_out(const uint8_t *image, size_t pitch, const int *box, uint8_t *crop, size_t group) {
  const int width = box[2], height = box[3];
  const __m128i spread = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
  image += box[1] * pitch + 3 * box[0];
  int row = 0;
  for (; row + TOGETHER <= height; row += TOGETHER, image += TOGETHER * pitch, crop += group) {
    int x = 0;
    for (; x + 6 <= width; x += 4) { /* 16 bytes of each row, of which 12 are four pixels, and the rest is its own too */
      __m128i r[TOGETHER];
      for (int k = 0; k < TOGETHER; ++k)
        r[k] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(image + k * pitch + 3 * x)), spread);
      const __m128i a = _mm_unpacklo_epi32(r[0], r[1]), b = _mm_unpacklo_epi32(r[2], r[3]);
      const __m128i c = _mm_unpackhi_epi32(r[0], r[1]), d = _mm_unpackhi_epi32(r[2], r[3]);
      __m128i *to = (__m128i *)(crop + (size_t)x * LANES);
      _mm_storeu_si128(to, _mm_unpacklo_epi64(a, b)), _mm_storeu_si128(to + 1, _mm_unpackhi_epi64(a, b));
      _mm_storeu_si128(to + 2, _mm_unpacklo_epi64(c, d)), _mm_storeu_si128(to + 3, _mm_unpackhi_epi64(c, d));
    }
    for (; x < width; ++x)
      for (int k = 0; k < TOGETHER; ++k) memcpy(crop + (size_t)x * LANES + 4 * k, image + k * pitch + 3 * x, 3);
  }
  for (int k = 0; row < height; ++row, ++k, image += pitch)
    for (int x = 0; x < width; ++x) memcpy(crop + (size_t)x * LANES + 4 * k, image + 3 * x, 3);
}

static inline void store_pixel(int rgb, uint8_t *to) { memcpy(to, &rgb, 2), to[2] = (uint8_t)(rgb >> 16); }

/* With the number of pairs known to the compiler, for those that are met most. */
#define FOR_PAIRS(pairs, call)   \
  switch (pairs) {               \
    case 2: call(2); break;      \
    case 3: call(3); break;      \
    case 4: call(4); break;      \
    default: call(pairs); break; \
  }

static inline void columns(const uint8_t *crop, size_t group, int rows, const Taps *taps, const int pairs, int out,
                           int mirror, uint8_t *to, int pitch) {
  for (int row = 0; row < rows; row += TOGETHER, crop += group, to += (size_t)TOGETHER * pitch)
    for (int x = 0; x < out; ++x) {
      const uint8_t *from = crop + (size_t)taps->first[x] * LANES;
      const __m128i four = weigh(from, LANES, taps->weights + (size_t)x * pairs, pairs, taps->bits);
      uint8_t *target = to + 3 * (mirror ? out - 1 - x : x);
      store_pixel(_mm_cvtsi128_si32(four), target);
      store_pixel(_mm_extract_epi32(four, 1), target + pitch);
      store_pixel(_mm_extract_epi32(four, 2), target + 2 * pitch);
      store_pixel(_mm_extract_epi32(four, 3), target + 3 * pitch);
    }
}

static inline void rows_of(const uint8_t *from, int pitch, const Taps *taps, const int pairs, int out, uint8_t *to) {
  const int width = 3 * out;
  for (int y = 0; y < out; ++y, to += width) {
    const uint8_t *first = from + (size_t)taps->first[y] * pitch;
    const int32_t *weights = taps->weights + (size_t)y * pairs;
    for (int x = 0; x < width; x += LANES) { /* `from` has room for whole vectors */
      const __m128i some = weigh(first + x, pitch, weights, pairs, taps->bits);
      if (width - x >= LANES)
        _mm_storeu_si128((__m128i *)(to + x), some);
      else
        memcpy(to + x, &some, width - x);
    }
  }
}

static void resize_columns(const uint8_t *crop, size_t group, int rows, const Taps *taps, int out, int mirror,
                           uint8_t *to, int pitch) {
#define CALL(pairs) columns(crop, group, rows, taps, pairs, out, mirror, to, pitch)
  FOR_PAIRS(taps->pairs, CALL)
#undef CALL
}

static void resize_rows(const uint8_t *from, int pitch, const Taps *taps, int out, uint8_t *to) {
#define CALL(pairs) rows_of(from, pitch, taps, pairs, out, to)
  FOR_PAIRS(taps->pairs, CALL)
#undef CALL
}

/* `crop_of` of augment.py in the same operations, and the whole pixels that `_crop` takes. */
static void crop_of(int width, int height, const double *u, double smallest, double largest, double ratio, int *box) {
  const double area = (smallest + (largest - smallest) * u[0]) * width * height;
  const double aspect = pow(ratio, 2 * u[1] - 1);
  double crop_width = sqrt(area * aspect), crop_height = sqrt(area / aspect), shrink = 1.0;
  if (width / crop_width < shrink) shrink = width / crop_width;
  if (height / crop_height < shrink) shrink = height / crop_height;
  crop_width *= shrink, crop_height *= shrink;
  const double left = u[2] * (width - crop_width), top = u[3] * (height - crop_height);
  const int x = (int)fmin(rint(left), width - 1), y = (int)fmin(rint(top), height - 1);
  const int right = (int)fmin(fmax(x + 1, rint(left + crop_width)), width);
  const int bottom = (int)fmin(fmax(y + 1, rint(top + crop_height)), height);
  box[0] = x, box[1] = y, box[2] = right - x, box[3] = bottom - y;
}

/* The taps from `in` pixels to `out`, made when they are first asked for; none without memory. */
static const Taps *taps_of(int in, int out, Taps *known) {
  return known[in].weights || !make_taps(in, out, &known[in]) ? &known[in] : NULL;
}

typedef void (*Some)(const void *whole, int64_t first, int64_t end); /* does its share of the work on `whole` */

typedef struct {
  Some some;
  const void *whole;
  int64_t first, end;
} Share;

static void *do_share(void *share) {
  const Share *own = share;
  own->some(own->whole, own->first, own->end);
  return NULL;
}

enum { MOST_THREADS = 16 }; /* loader.py wants four at most */

/* Rows 0 ... n - 1, in shares of so many threads, of which this is one. */
static void in_threads(Some some, const void *whole, int64_t n, int64_t threads) {
  pthread_t others[MOST_THREADS];
  Share shares[MOST_THREADS];
  int started[MOST_THREADS] = {0};
  threads = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
  for (int64_t t = 0; t < threads; ++t) {
    shares[t] = (Share){some, whole, n * t / threads, n * (t + 1) / threads};
    if (t) started[t] = !pthread_create(&others[t], NULL, do_share, &shares[t]);
  }
  for (int64_t t = 0; t < threads; ++t) /* the first one here, and what found no thread */
    if (!started[t]) do_share(&shares[t]);
  for (int64_t t = 1; t < threads; ++t)
    if (started[t]) pthread_join(others[t], NULL);
}

typedef struct {
  const uint8_t *images;
  int64_t height, width, numbers, size;
  const int64_t *places;
  const double *u;
  double smallest, largest, ratio, flip;
  uint8_t *out;
  int *failed; /* is set to 1 by any thread */
} Shaping;

static void shape_some(const void *whole, int64_t first, int64_t end) {
  const Shaping *all = whole;
  const int height = (int)all->height, width = (int)all->width, size = (int)all->size;
  const int64_t *places = all->places;
  const int longer = width > height ? width : height, spare = most_taps(longer, size) + 1;
  const int pitch = 3 * size + LANES;                   /* room behind the last pixel of a row */
  const size_t group = (size_t)(width + spare) * LANES; /* and behind the last column and row for taps of weight 0 */
  const size_t bytes = (size_t)height * width * 3, result = (size_t)3 * size * size;
  uint8_t *crop = calloc((height + TOGETHER) / TOGETHER, group), *narrow = calloc(height + TOGETHER + spare, pitch);
  Taps *known = calloc(longer + 1, sizeof *known);
  int failed = !crop || !narrow || !known;
  for (int64_t i = first; i < end && !failed; ++i) {
    if (places[i] < 0) continue;
    if (i + 1 < end && places[i + 1] >= 0) /* the next one lies elsewhere, in memory that nobody has touched lately */
      for (size_t line = 0; line < bytes && line < AHEAD; line += 64)
        _mm_prefetch(all->images + places[i + 1] * bytes + line, _MM_HINT_T1);
    const double *u = all->u + i * all->numbers;
    int box[4];
    crop_of(width, height, u, all->smallest, all->largest, all->ratio, box);
    /* where a side stays as long as it is, each pixel is made of itself alone */
    const Taps *across = taps_of(box[2], size, known), *down = taps_of(box[3], size, known);
    failed = !across || !down;
    if (failed) break;
    cut_out(all->images + places[i] * bytes, 3 * (size_t)width, box, crop, group);
    resize_columns(crop, group, box[3], across, size, u[5] < all->flip, narrow, pitch);
    resize_rows(narrow, pitch, down, size, all->out + i * result);
  }
  for (int in = 0; known && in <= longer; ++in) free(known[in].first), free(known[in].weights);
  free(crop), free(narrow), free(known);
  if (failed) __atomic_store_n(all->failed, 1, __ATOMIC_RELAXED);
}

/* Rows of n images: image places[i] of `images` (height, width, 3), to `out` (n, size, size, 3); place -1 is left out.
 * u: n rows of `numbers`. Returns 0, or 1 where there is no memory. */
int shape_images(int64_t n, const uint8_t *images, int64_t height, int64_t width, const int64_t *places, const double *u,
                 int64_t numbers, double smallest, double largest, double ratio, double flip, int64_t size,
                 uint8_t *out, int64_t threads) {
  int failed = 0;
  const Shaping all = {images, height, width, numbers, size, places, u, smallest, largest, ratio, flip, out, &failed};
  in_threads(shape_some, &all, n, threads);
  return failed;
}

/* 16 pixels, 48 bytes, as 16 bytes of each channel, and back: byte i of channel c is byte 3 i + c. */
typedef struct {
  __m128i channel[3];
} Pixels;

/* Which byte goes where, as a shuffle wants it; -1: none. */
typedef struct {
  __m128i apart[3][3], together[3][3]; /* [of which vector or channel][into which] */
} Shuffles;

static Shuffles shuffles_of(void) {
  int8_t apart[3][3][16], together[3][3][16];
  memset(apart, -1, sizeof apart), memset(together, -1, sizeof together);
  for (int i = 0; i < 16; ++i)
    for (int c = 0; c < 3; ++c) {
      const int at = 3 * i + c;
      apart[at / 16][c][i] = (int8_t)(at % 16);
      together[c][at / 16][at % 16] = (int8_t)i;
    }
  Shuffles shuffles;
  memcpy(shuffles.apart, apart, sizeof apart), memcpy(shuffles.together, together, sizeof together);
  return shuffles;
}

static inline __m128i gathered(const __m128i *three, const __m128i (*by)[3], int which) {
  const __m128i first = _mm_shuffle_epi8(three[0], by[0][which]), second = _mm_shuffle_epi8(three[1], by[1][which]);
  return _mm_or_si128(_mm_or_si128(first, second), _mm_shuffle_epi8(three[2], by[2][which]));
}

static inline Pixels load_pixels(const uint8_t *from, const Shuffles *by) {
  __m128i three[3];
  Pixels pixels;
  for (int k = 0; k < 3; ++k) three[k] = _mm_loadu_si128((const __m128i *)from + k);
  for (int c = 0; c < 3; ++c) pixels.channel[c] = gathered(three, by->apart, c);
  return pixels;
}

static inline void store_pixels(Pixels pixels, uint8_t *to, const Shuffles *by) {
  for (int k = 0; k < 3; ++k) _mm_storeu_si128((__m128i *)to + k, gathered(pixels.channel, by->together, k));
}

static void sum_channels(const uint8_t *pixels, int64_t count, const Shuffles *by, int64_t *sums) {
  __m128i added[3] = {_mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128()};
  int64_t j = 0;
  for (; j + 16 <= count; j += 16) {
    const Pixels some = load_pixels(pixels + 3 * j, by);
    for (int c = 0; c < 3; ++c)
      added[c] = _mm_add_epi64(added[c], _mm_sad_epu8(some.channel[c], _mm_setzero_si128()));
  }
  for (int c = 0; c < 3; ++c) {
    sums[c] = _mm_extract_epi64(added[c], 0) + _mm_extract_epi64(added[c], 1);
    for (int64_t k = j; k < count; ++k) sums[c] += pixels[3 * k + c];
  }
}

static inline Pixels mapped(Pixels pixels, const int32_t *matrix, const int32_t *offset, int bits) {
  const __m128i none = _mm_setzero_si128(), shift = _mm_cvtsi32_si128(bits), *channel = pixels.channel;
  const __m256i red_green[2] = {_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(channel[0], channel[1])),
                                _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(channel[0], channel[1]))};
  const __m256i blue[2] = {_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(channel[2], none)),
                           _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(channel[2], none))};
  Pixels result;
  for (int c = 0; c < 3; ++c) {
    const int32_t *m = matrix + 3 * c;
    const __m256i of_red_green = _mm256_set1_epi32((uint16_t)m[0] | m[1] * 65536);
    const __m256i of_blue = _mm256_set1_epi32((uint16_t)m[2]), start = _mm256_set1_epi32(offset[c]);
    __m256i half[2];
    for (int k = 0; k < 2; ++k) {
      const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(red_green[k], of_red_green), start);
      half[k] = _mm256_sra_epi32(_mm256_add_epi32(sum, _mm256_madd_epi16(blue[k], of_blue)), shift);
    }
    result.channel[c] = to_bytes(half[0], half[1]);
  }
  return result;
}

typedef struct {
  uint8_t *pixels;
  int64_t count;
  const int32_t *matrix;
  const double *level;
  int bits;
} Recoloring;

static void recolor_some(const void *whole, int64_t first, int64_t end) {
  const Recoloring *all = whole;
  const Shuffles by = shuffles_of();
  const int64_t count = all->count;
  for (int64_t i = first; i < end; ++i) {
    uint8_t *pixels = all->pixels + 3 * count * i;
    const int32_t *matrix = all->matrix + 9 * i;
    int64_t sums[3];
    sum_channels(pixels, count, &by, sums);
    const double mean = (double)(299 * sums[0] + 587 * sums[1] + 114 * sums[2]) / (1000.0 * count);
    int32_t offset[3];
    for (int c = 0; c < 3; ++c)
      offset[c] = (int32_t)rint(all->level[3 * i + c] * mean * (1 << all->bits)) + (1 << (all->bits - 1));
    int64_t j = 0;
    for (; j + 16 <= count; j += 16)
      store_pixels(mapped(load_pixels(pixels + 3 * j, &by), matrix, offset, all->bits), pixels + 3 * j, &by);
    if (j < count) { /* the last ones, with what fills them up */
      uint8_t some[48] = {0};
      memcpy(some, pixels + 3 * j, 3 * (count - j));
      store_pixels(mapped(load_pixels(some, &by), matrix, offset, all->bits), some, &by);
      memcpy(pixels + 3 * j, some, 3 * (count - j));
    }
  }
}

/* `recolor` of augment.py: n images of `count` pixels in place. matrix: n times 3 x 3, over 2^bits and within 16 bits;
 * level: n times 3. */
void recolor_images(int64_t n, uint8_t *pixels, int64_t count, const int32_t *matrix, const double *level, int bits,
                    int64_t threads) {
  const Recoloring all = {pixels, count, matrix, level, bits};
  in_threads(recolor_some, &all, n, threads);
}
