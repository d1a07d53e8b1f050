/* Crop, resize and mirror many small images, and change their colours: what augment.py does one by one with torch.
 *
 * The results are the same, byte for byte (tests/shards/test_compiled.py). Built and called by compiled.py.
 */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 16, TOGETHER = 4 }; /* sums at a time: of 16 bytes of a row, or of a pixel's 4 bytes in 4 rows */

/* For each of `out` pixels along one axis: which pixels it is made of, and by which weights. */
typedef struct {
  int first, count;
  int16_t *weight;
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

/* Weights as integers over 2^bits, which is returned: the finest that the largest of them leaves in 16 bits. */
static int make_taps(int in, int out, int most, Taps *taps, int16_t *weights, double *exact) {
  const double scale = (double)in / out;
  const double support = scale >= 1.0 ? 2.0 * scale : 2.0, shrink = scale >= 1.0 ? 1.0 / scale : 1.0;
  double largest = 0.0;
  for (int i = 0; i < out; ++i) {
    const double center = scale * (i + 0.5);
    const int64_t first = (int64_t)(center - support + 0.5), last = (int64_t)(center + support + 0.5);
    taps[i].first = first > 0 ? (int)first : 0;
    taps[i].count = (int)(last < in ? last : in) - taps[i].first;
    if (taps[i].count > most) taps[i].count = most;
    taps[i].weight = weights + (size_t)i * most;
    double total = 0.0, *own = exact + (size_t)i * most;
    for (int j = 0; j < taps[i].count; ++j) total += own[j] = cubic((j + taps[i].first - center + 0.5) * shrink);
    for (int j = 0; j < taps[i].count; ++j) {
      if (total != 0.0) own[j] /= total;
      if (own[j] > largest) largest = own[j];
    }
  }
  int bits = 0;
  while (bits < 22 && (int)(0.5 + largest * (1 << (bits + 1))) < (1 << 15)) ++bits;
  for (int i = 0; i < out; ++i)
    for (int j = 0; j < taps[i].count; ++j) {
      const double scaled = exact[(size_t)i * most + j] * (1 << bits);
      taps[i].weight[j] = (int16_t)(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    }
  return bits;
}

/* LANES sums of `count` runs of bytes, `apart` from each other, each times its weight; 0 ... 255, rounded. */
static inline __m128i weigh(const uint8_t *from, size_t apart, const int16_t *weight, int count, int bits) {
  __m256i low = _mm256_set1_epi32(1 << (bits - 1)), high = low;
  for (int j = 0; j < count; j += 2, from += 2 * apart) { /* two at a time: one instruction sums pairs of products */
    const int paired = j + 1 < count;
    const __m128i one = _mm_loadu_si128((const __m128i *)from);
    const __m128i other = paired ? _mm_loadu_si128((const __m128i *)(from + apart)) : _mm_setzero_si128();
    const __m256i both = _mm256_set1_epi32((uint16_t)weight[j] | (paired ? weight[j + 1] * 65536 : 0));
    low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(one, other)), both));
    high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_unpackhi_epi8(one, other)), both));
  }
  const __m128i shift = _mm_cvtsi32_si128(bits);
  low = _mm256_sra_epi32(low, shift), high = _mm256_sra_epi32(high, shift);
  /* packing saturates, half by half of a register: put the halves in order */
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
  return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

/* A crop of an image whose rows are `pitch` bytes: groups of TOGETHER rows, whose pixels of a column lie together. */
static void cut_out(const uint8_t *image, size_t pitch, const int *box, uint8_t *crop) {
  const int width = box[2], height = box[3];
  image += box[1] * pitch + 3 * box[0];
  for (int row = 0; row < height; ++row, image += pitch) {
    uint8_t *to = crop + (size_t)(row / TOGETHER) * width * LANES + row % TOGETHER * 4;
    for (int x = 0; x < width; ++x) memcpy(to + (size_t)x * LANES, image + 3 * x, 3);
  }
}

static inline void store_pixel(int rgb, uint8_t *to) { memcpy(to, &rgb, 2), to[2] = (uint8_t)(rgb >> 16); }

static void resize_columns(const uint8_t *crop, int width, int rows, const Taps *taps, int bits, int out, int mirror,
                           uint8_t *to, int pitch) {
  for (int row = 0; row < rows; row += TOGETHER, crop += (size_t)width * LANES, to += (size_t)TOGETHER * pitch)
    for (int x = 0; x < out; ++x) {
      const __m128i four = weigh(crop + (size_t)taps[x].first * LANES, LANES, taps[x].weight, taps[x].count, bits);
      uint8_t *target = to + 3 * (mirror ? out - 1 - x : x);
      store_pixel(_mm_cvtsi128_si32(four), target);
      store_pixel(_mm_extract_epi32(four, 1), target + pitch);
      store_pixel(_mm_extract_epi32(four, 2), target + 2 * pitch);
      store_pixel(_mm_extract_epi32(four, 3), target + 3 * pitch);
    }
}

static void resize_rows(const uint8_t *from, int pitch, const Taps *taps, int bits, int out, uint8_t *to) {
  const int width = 3 * out;
  for (int y = 0; y < out; ++y, to += width)
    for (int x = 0; x < width; x += LANES) { /* `from` has room for whole vectors */
      const __m128i some = weigh(from + (size_t)taps[y].first * pitch + x, pitch, taps[y].weight, taps[y].count, bits);
      if (width - x >= LANES)
        _mm_storeu_si128((__m128i *)(to + x), some);
      else
        memcpy(to + x, &some, width - x);
    }
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

/* Rows of n images: image places[i] of `images` (height, width, 3), to `out` (n, size, size, 3); place -1 is left out.
 * u: n rows of `numbers`. Returns 0, or 1 where there is no memory. */
int shape_images(int64_t n, const uint8_t *images, int64_t height, int64_t width, const int64_t *places, const double *u,
                 int64_t numbers, double smallest, double largest, double ratio, double flip, int64_t size,
                 uint8_t *out) {
  const int pitch = 3 * (int)size + LANES; /* room behind the last pixel of a row */
  const int most = most_taps((int)(width > height ? width : height), (int)size);
  const size_t rows = height + TOGETHER, taps_room = (size_t)size * most;
  uint8_t *crop = calloc(rows * width, 4), *narrow = malloc(rows * pitch);
  Taps *taps = malloc(size * sizeof *taps);
  int16_t *weights = malloc(taps_room * sizeof *weights);
  double *exact = malloc(taps_room * sizeof *exact);
  const int short_of_memory = !crop || !narrow || !taps || !weights || !exact;
  for (int64_t i = 0; i < n && !short_of_memory; ++i, u += numbers, out += 3 * size * size) {
    if (places[i] < 0) continue;
    const uint8_t *image = images + (size_t)places[i] * height * width * 3;
    const int mirror = u[5] < flip;
    int box[4];
    crop_of((int)width, (int)height, u, smallest, largest, ratio, box);
    cut_out(image, 3 * width, box, crop);
    /* where a side stays as long as it is, each pixel is made of itself alone */
    int bits = make_taps(box[2], (int)size, most, taps, weights, exact);
    resize_columns(crop, box[2], box[3], taps, bits, (int)size, mirror, narrow, pitch);
    bits = make_taps(box[3], (int)size, most, taps, weights, exact);
    resize_rows(narrow, pitch, taps, bits, (int)size, out);
  }
  free(crop), free(narrow), free(taps), free(weights), free(exact);
  return short_of_memory;
}

/* `recolor` of augment.py: n images of `count` pixels in place. matrix: n times 3 x 3, over 2^bits; level: n times 3. */
void recolor_images(int64_t n, uint8_t *pixels, int64_t count, const int32_t *matrix, const double *level, int bits) {
  for (int64_t i = 0; i < n; ++i, pixels += 3 * count, matrix += 9, level += 3) {
    int64_t red = 0, green = 0, blue = 0;
    for (int64_t j = 0; j < count; ++j) red += pixels[3 * j], green += pixels[3 * j + 1], blue += pixels[3 * j + 2];
    const double mean = (double)(299 * red + 587 * green + 114 * blue) / (1000.0 * count);
    int32_t offset[3], m[9];
    for (int c = 0; c < 3; ++c) offset[c] = (int32_t)rint(level[c] * mean * (1 << bits)) + (1 << (bits - 1));
    memcpy(m, matrix, sizeof m);
    for (int64_t j = 0; j < count; ++j) {
      uint8_t *p = pixels + 3 * j;
      const int32_t r = p[0], g = p[1], b = p[2];
      for (int c = 0; c < 3; ++c) {
        const int32_t value = (m[3 * c] * r + m[3 * c + 1] * g + m[3 * c + 2] * b + offset[c]) >> bits;
        p[c] = (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
      }
    }
  }
}
