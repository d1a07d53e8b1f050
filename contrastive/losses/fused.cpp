// What softmax losses do with one tile of logits, each in one pass over the tile's memory. Built by fused.py.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr float kLog2E = 1.44269504f;
constexpr int64_t kRowsOfAThread = 64;  // at least, so that starting a thread pays

// 2^x to 1e-7, for a compiler to vectorise: a Chebyshev fit of 2^f on [-1/2, 1/2] times a power of two from its bits.
inline float power_of_two(float x) {
  const float whole = __builtin_rintf(x), f = x - whole;
  float fraction = 1.5310081e-05f;
  fraction = fraction * f + 1.5469732e-04f;
  fraction = fraction * f + 1.3333451e-03f;
  fraction = fraction * f + 9.6180256e-03f;
  fraction = fraction * f + 5.5504109e-02f;
  fraction = fraction * f + 2.4022651e-01f;
  fraction = fraction * f + 6.9314718e-01f;
  fraction = fraction * f + 1.0f;
  float in_range = whole < -126.f ? -126.f : whole;
  in_range = in_range > 127.f ? 127.f : in_range;
  const int32_t bits = (static_cast<int32_t>(in_range) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  float y = x < -126.f ? 0.f : fraction * power;  // what float32 holds with fewer bits counts as nothing
  y = x >= 128.f ? std::numeric_limits<float>::infinity() : y;
  return x != x ? x : y;
}

inline void exp_row(float* __restrict x, float* __restrict column_sum, int64_t c, float shift, float& row_sum,
                    float& best) {
  float sum = 0, largest = best;
#pragma omp simd reduction(+ : sum) reduction(max : largest)
  for (int64_t j = 0; j < c; ++j) {
    const float e = power_of_two(x[j] * kLog2E - shift);
    x[j] = e;
    column_sum[j] += e;
    sum += e;
    largest = e > largest ? e : largest;
  }
  row_sum += sum;
  best = largest;
}

inline void slope_row(float* __restrict x, const float* __restrict column, int64_t c, float shift, float row) {
#pragma omp simd
  for (int64_t j = 0; j < c; ++j) x[j] = power_of_two(x[j] * kLog2E - shift) * (row + column[j]);
}

inline void multiply_row(float* __restrict x, const float* __restrict column, int64_t c, float row) {
#pragma omp simd
  for (int64_t j = 0; j < c; ++j) x[j] *= row + column[j];
}

void check(const at::Tensor& x, const at::Tensor& row, const at::Tensor& column) {
  TORCH_CHECK(x.is_contiguous() && row.is_contiguous() && column.is_contiguous(), "contiguous tensors only");
  TORCH_CHECK(x.dim() == 2 && row.numel() == x.size(0) && column.numel() == x.size(1), "a row or column per factor");
}

void exp_sums(at::Tensor x, double shift, at::Tensor row_sum, at::Tensor column_sum, at::Tensor best) {
  check(x, row_sum, column_sum);
  TORCH_CHECK(best.is_contiguous() && best.numel() == x.size(0), "a best for each row");
  const int64_t c = x.size(1);
  const float s = static_cast<float>(shift * 1.4426950408889634);
  float *X = x.data_ptr<float>(), *rows = row_sum.data_ptr<float>(), *bests = best.data_ptr<float>();
  float* columns = column_sum.data_ptr<float>();
  // A thread adds to columns of its own; they are put together in the order of threads, for the same sum every time.
  const int64_t threads = at::get_num_threads();
  std::vector<float> own_columns(threads * c, 0.f);
  at::parallel_for(0, x.size(0), kRowsOfAThread, [&](int64_t first, int64_t last) {
    float* own = own_columns.data() + at::get_thread_num() * c;
    for (int64_t i = first; i < last; ++i) exp_row(X + i * c, own, c, s, rows[i], bests[i]);
  });
  for (int64_t thread = 0; thread < threads; ++thread)
    for (int64_t j = 0; j < c; ++j) columns[j] += own_columns[thread * c + j];
}

void exp_slope(at::Tensor x, double shift, at::Tensor row, at::Tensor column, bool fresh) {
  check(x, row, column);
  const int64_t c = x.size(1);
  const float s = static_cast<float>(shift * 1.4426950408889634);
  float* X = x.data_ptr<float>();
  const float *rows = row.data_ptr<float>(), *columns = column.data_ptr<float>();
  at::parallel_for(0, x.size(0), kRowsOfAThread, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (fresh) {
        slope_row(X + i * c, columns, c, s, rows[i]);
      } else {
        multiply_row(X + i * c, columns, c, rows[i]);
      }
    }
  });
}

}  // namespace

TORCH_LIBRARY(contrastive, library) {
  library.def(
      "exp_sums(Tensor(a!) x, float shift, Tensor(b!) row_sum, Tensor(c!) column_sum, Tensor(d!) best) -> ()",
      &exp_sums);
  library.def("exp_slope(Tensor(a!) x, float shift, Tensor row, Tensor column, bool fresh) -> ()", &exp_slope);
}
