// The drift behind a small trunk, in five launches (DESIGN E2, E5): what its kernels are told, and the kernels.
//
//   columns_kernel  Y'Y of each segment of columns, Y = [V_H | dV]; and the two parts of the first layer
//   sum_columns     sums over its blocks
//   rows_kernel     tiles of (task, chunk) rows: trunk forward, X'WX, d/dH = 2 WX (Y'V_H), trunk backward, with the weights
//                   of all layers but the first in shared memory
//   sum_rows        sums over its blocks, and over the rows of each task and each chunk
//   finish_kernel   d/dV = 2 Y (X'W [H | 1]), the value, and what is left of the first layer's gradients
//
// Chunks and columns are cut where a rectangle of the plan begins or ends: every group of chunks is met by whole segments of
// columns. Every block takes rows (columns) that follow each other, and leaves its sums in a slot of its own; slots are
// added in a fixed order, so that a call repeats bit for bit. Sums that the value is made of are float64 beyond some tens of
// rows.
#pragma once

#include "activation.cuh"
#include "products.cuh"

namespace fasthyper::gpu {

constexpr int kMaxLayers = 8;
constexpr int kMaxParts = 16;  // groups of chunks, segments of columns
constexpr int kWidest = 128;
constexpr int kColumns = 64;         // most columns of a tile
constexpr int kColumnThreads = 320;  // most of them: with two blocks a processor, each has 96 registers
constexpr int kRowThreads = 256;     // most of them
constexpr int kThreads = 256;        // of the other kernels
constexpr int kSumLanes = 32;        // elements that a block adds up at a time

// Units, rows or columns, of some parts that follow each other, shared evenly among blocks
struct Runs {
  int num_parts, num_blocks;
  int start[kMaxParts + 1];

  __host__ __device__ int num_units() const { return start[num_parts]; }
  __host__ __device__ int begin(int block) const { return static_cast<int>(int64_t(num_units()) * block / num_blocks); }
  __host__ __device__ int block_of(int unit) const {
    return static_cast<int>(((unit + int64_t(1)) * num_blocks - 1) / num_units());
  }
  // A block meets parts in order: no two pairs of them share a slot
  __host__ __device__ int slot(int block, int part) const { return block + part; }
  __host__ __device__ int num_slots() const { return num_blocks + num_parts; }

  // body(part, lo, hi) for the units of each part that a block has
  template <typename Body>
  __device__ void for_parts(int block, const Body& body) const {
    int part = 0;
    for (int lo = begin(block), stop = begin(block + 1); lo < stop;) {
      while (start[part + 1] <= lo) ++part;
      const int hi = stop < start[part + 1] ? stop : start[part + 1];
      body(part, lo, hi);
      lo = hi;
    }
  }
};

template <typename T>
struct Layer {
  const T *weight, *bias, *weight0, *bias0, *a0;  // a0 [T, N, width], or null, as of the first
  T *grad_weight, *grad_bias;
  int width;
  // where things lie in shared memory: [dx | x0] of the tile's rows, the slopes, which gradients replace, both weights
  int x, x_stride, x0, slope, slope_stride, w, w_stride;
  int sums;  // of its gradient, weight [padded o, padded i], then bias, among those of a block
};

template <typename T>
struct Problem {
  int num_tasks, num_chunks, task_dim, chunk_dim, num_layers, width, full;  // full = 2 width + 1
  Activation activation;
  const T *embeddings, *embeddings0, *chunks, *chunks0, *basis, *basis0, *task_weight;
  T *value, *grad_embeddings, *grad_chunks, *grad_basis;
  Layer<T> layers[kMaxLayers];

  Runs columns, rows, last_columns;
  int chunk_cut[kMaxParts + 1];                 // group g has chunks [chunk_cut[g], chunk_cut[g + 1])
  unsigned char covers[kMaxParts][kMaxParts];   // how many rectangles hold a group's rows and a segment's columns
  int gram_pieces, piece_tiles, column_shares;  // of columns_kernel: blocks per run, tiles of each, threads per tile
  int row_tile, layer_sums, memory_size;        // of rows_kernel: rows at a time; sums per block; elements of shared memory
  int to_h, row_weight, row_place, tile_table, shared_layer_sums;  // where they lie in it
  bool sums_are_shared;                                            // sums lie there, too, and not only in their slot
  int last_tile;                                                   // of finish_kernel, columns at a time
  int tasks_of_slice, num_slices;                                  // of the sums of each chunk's rows
  int first_blocks;                                                // of columns_kernel, those of the first layer

  T *from_task, *from_chunk, *from_task0, *from_chunk0;         // [T, o], [N, o]: parts of the first layer's da and a0
  T* row_grad;                                                  // [T, N, o] of the first layer
  T *task_grad, *chunk_grad;                                    // [T, o], [slices, N, o]
  double *column_slots, *row_slots, *column_grams, *row_grams;  // tiles
  T* layer_slots;

  __device__ int gram_size() const { return gram_tiles(full) * kSide * kSide; }
};

// ---- columns

// y = [v | v - v0] of ``count`` columns from ``first`` on
template <typename T>
__device__ void load_columns(const Problem<T>& p, int first, int count, T* y, int stride) {
  constexpr int kLoads = 6;  // that are under way at once
  const int k = p.width + 1, size = count * k, threads = blockDim.x;
  const T *now = p.basis + int64_t(first) * k, *then = p.basis0 + int64_t(first) * k;
  const float per_k = 1.0f / k;
  for (int base = threadIdx.x; base < size; base += kLoads * threads) {
    T v[kLoads], v0[kLoads];
#pragma unroll
    for (int q = 0; q < kLoads; ++q)
      if (base + q * threads < size) v[q] = now[base + q * threads], v0[q] = then[base + q * threads];
#pragma unroll
    for (int q = 0; q < kLoads; ++q) {
      const int e = base + q * threads;
      if (e >= size) break;
      const int col = static_cast<int>((e + 0.5f) * per_k), j = e - col * k;  // exact: at most 64 * 129 elements
      if (j < p.width) y[col * stride + j] = v[q];
      y[col * stride + p.width + j] = v[q] - v0[q];
    }
  }
}

// Of row ``row`` of [now], [then], part of the first layer's da, and of its a0
template <typename T>
__device__ void first_part(const Problem<T>& p, const T* now, const T* then, int depth, int start, bool has_bias, int o,
                           T* to, T* to0) {
  const Layer<T>& layer = p.layers[0];
  const int64_t at = int64_t(o) * (p.task_dim + p.chunk_dim) + start;
  const T *w = layer.weight + at, *w0 = layer.weight0 + at;
  T da = has_bias ? layer.bias[o] - layer.bias0[o] : T(0), a0 = has_bias ? layer.bias0[o] : T(0);
#pragma unroll 4
  for (int k = 0; k < depth; ++k) {
    da += (now[k] - then[k]) * w[k] + then[k] * (w[k] - w0[k]);
    a0 += then[k] * w0[k];
  }
  *to = da;
  *to0 = a0;
}

template <typename T>
__global__ void __launch_bounds__(kColumnThreads, sizeof(T) == 4 ? 2 : 1)
    columns_kernel(const __grid_constant__ Problem<T> p) {
  const int threads = blockDim.x, tid = threadIdx.x;
  if (static_cast<int>(blockIdx.x) < p.first_blocks) {
    const int width = p.layers[0].width;
    const int64_t i = int64_t(blockIdx.x) * threads + tid, row = i / width;
    const int o = static_cast<int>(i % width);
    if (row < p.num_tasks) {
      first_part(p, p.embeddings + row * p.task_dim, p.embeddings0 + row * p.task_dim, p.task_dim, 0, true, o,
                 p.from_task + i, p.from_task0 + i);
    } else if (row < int64_t(p.num_tasks) + p.num_chunks) {
      const int64_t chunk = row - p.num_tasks, at = i - int64_t(p.num_tasks) * width;
      first_part(p, p.chunks + chunk * p.chunk_dim, p.chunks0 + chunk * p.chunk_dim, p.chunk_dim, p.task_dim, false, o,
                 p.from_chunk + at, p.from_chunk0 + at);
    }
    return;
  }
  const int block = (blockIdx.x - p.first_blocks) / p.gram_pieces, piece = (blockIdx.x - p.first_blocks) % p.gram_pieces;
  T* y = shared_memory<T>();
  const int stride = padded(p.full), share = tid / p.piece_tiles, tile = piece * p.piece_tiles + tid % p.piece_tiles;
  const bool has_tile = share < p.column_shares && tile < gram_tiles(p.full);
  const TileIndex at = gram_tile(has_tile ? tile : 0, tiles(p.full));
  p.columns.for_parts(block, [&](int segment, int lo, int hi) {
    Block<double> total = {};
    for (int first = lo; first < hi; first += kColumns) {
      const int count = hi - first < kColumns ? hi - first : kColumns;
      load_columns(p, first, count, y, stride);
      __syncthreads();
      if (has_tile) {
        Block<T> sum = {};
        multiply_tall(y + at.i * kSide, stride, y + at.j * kSide, stride, share, count, p.column_shares, sum);
#pragma unroll
        for (int i = 0; i < kSide; ++i)
#pragma unroll
          for (int j = 0; j < kSide; ++j) total[i][j] += sum[i][j];
      }
      __syncthreads();
    }
    double* sums = shared_memory<double>() + tid % p.piece_tiles;
    for (int q = 0; q < p.column_shares; ++q) {  // threads of the same tile, one after the other
      if (has_tile && share == q) {
#pragma unroll
        for (int e = 0; e < kSide * kSide; ++e) {
          const double before = q > 0 ? sums[e * p.piece_tiles] : 0;
          sums[e * p.piece_tiles] = before + total[e / kSide][e % kSide];
        }
      }
      __syncthreads();
    }
    double* slot = p.column_slots + int64_t(p.columns.slot(block, segment)) * p.gram_size() + piece * p.piece_tiles;
    if (share == 0 && has_tile)
      for (int e = 0; e < kSide * kSide; ++e) slot[e * gram_tiles(p.full) + tid] = sums[e * p.piece_tiles];
    __syncthreads();
  });
}

// ---- sums over slots

// Element by element, sums over slots [first, last]; put(element, sum). A block takes elements [chunk * kSumLanes, +
// kSumLanes)
template <typename From, typename Put>
__device__ void sum_slots(const From* slots, int size, int first, int last, int chunk, const Put& put) {
  const int lane = threadIdx.x % kSumLanes, share = threadIdx.x / kSumLanes, shares = kThreads / kSumLanes;
  const int element = chunk * kSumLanes + lane;
  double* sums = shared_memory<double>();
  double sum = 0;
  if (element < size) {
#pragma unroll 8
    for (int slot = first + share; slot <= last; slot += shares) sum += slots[int64_t(slot) * size + element];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (share > 0 || element >= size) return;
  for (int q = 1; q < shares; ++q) sum += sums[q * kSumLanes + lane];
  put(element, sum);
}

// The Gram matrix of one part, a group or a segment
template <typename T>
__device__ void sum_grams(const Problem<T>& p, const Runs& runs, const double* slots, double* grams, int part, int chunk) {
  const int size = p.gram_size();
  const int first = runs.block_of(runs.start[part]), last = runs.block_of(runs.start[part + 1] - 1);
  sum_slots(slots, size, runs.slot(first, part), runs.slot(last, part), chunk,
            [&](int element, double sum) { grams[int64_t(part) * size + element] = sum; });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sum_columns(const __grid_constant__ Problem<T> p) {
  const int chunks = (p.gram_size() + kSumLanes - 1) / kSumLanes;
  sum_grams(p, p.columns, p.column_slots, p.column_grams, blockIdx.x / chunks, blockIdx.x % chunks);
}

// put(c, sum over i of a[i a_stride] b[(i % period) b_stride + c]) for all columns c; a or b may be null: then it is all 1
template <typename T, typename Put>
__device__ void weighted_sum(int length, const T* a, int64_t a_stride, const T* b, int64_t b_stride, int period,
                             int num_cols, const Put& put) {
  double* sums = shared_memory<double>();
  for (int start = 0; start < num_cols; start += kThreads) {
    const int cols = num_cols - start < kThreads ? num_cols - start : kThreads, shares = kThreads / cols;
    const int share = threadIdx.x / cols, c = threadIdx.x % cols;
    double sum = 0;
    if (share < shares) {
#pragma unroll 4
      for (int i = share; i < length; i += shares)
        sum += double(a ? a[i * a_stride] : T(1)) * double(b ? b[i % period * b_stride + start + c] : T(1));
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (share == 0) {
      for (int q = 1; q < shares; ++q) sum += sums[q * cols + c];
      put(start + c, sum);
    }
    __syncthreads();
  }
}

// Blocks: Gram matrices of the groups, layers' gradients, sums over each task's rows, sums over each chunk's rows of a slice
// of the tasks
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_rows(const __grid_constant__ Problem<T> p) {
  const int gram_chunks = (p.gram_size() + kSumLanes - 1) / kSumLanes;
  const int layer_chunks = (p.layer_sums + kSumLanes - 1) / kSumLanes, width = p.layers[0].width;
  int64_t job = blockIdx.x;
  if (job < int64_t(p.rows.num_parts) * gram_chunks)
    return sum_grams(p, p.rows, p.row_slots, p.row_grams, static_cast<int>(job / gram_chunks),
                     static_cast<int>(job % gram_chunks));
  job -= int64_t(p.rows.num_parts) * gram_chunks;
  if (job < layer_chunks) {
    sum_slots(p.layer_slots, p.layer_sums, 0, p.rows.num_blocks - 1, static_cast<int>(job), [&](int element, double sum) {
      int l = p.num_layers - 1;
      while (element < p.layers[l].sums) --l;
      const int outputs = p.layers[l].width, inputs = p.layers[l - 1].width, stride = padded(inputs);
      const int at = element - p.layers[l].sums, o = at / stride, i = at % stride, bias = at - padded(outputs) * stride;
      if (bias >= 0 && bias < outputs)
        p.layers[l].grad_bias[bias] = T(sum);
      else if (o < outputs && i < inputs)
        p.layers[l].grad_weight[o * inputs + i] = T(sum);
    });
    return;
  }
  job -= layer_chunks;
  if (job < p.num_tasks) {
    weighted_sum<T>(p.num_chunks, nullptr, 0, p.row_grad + job * p.num_chunks * width, width, p.num_chunks, width,
                    [&](int o, double sum) { p.task_grad[job * width + o] = T(sum); });
    return;
  }
  job -= p.num_tasks;
  const int64_t slice = job / p.num_chunks, chunk = job % p.num_chunks, first = slice * p.tasks_of_slice;
  const int left = static_cast<int>(p.num_tasks - first), length = left < p.tasks_of_slice ? left : p.tasks_of_slice;
  weighted_sum<T>(length, nullptr, 0, p.row_grad + (first * p.num_chunks + chunk) * width, int64_t(p.num_chunks) * width,
                  length, width, [&](int o, double sum) { p.chunk_grad[job * width + o] = T(sum); });
}

// ---- rows

// A tile of rows in shared memory: how many, and how many blocks of 4 hold them. Row m of block b is m * blocks + b.
struct Tile {
  int count, blocks;
};

// Sets x = [dx | x0] and slopes of a layer, whose da lies where dx will, and a0, where it is not given, where slopes will
template <typename T>
__device__ void activate_rows(const Problem<T>& p, const Layer<T>& layer, bool is_first, Tile tile, T* memory) {
  const int* task = reinterpret_cast<const int*>(memory + p.row_place);
  const int* chunk = task + p.row_tile;
  const int width = layer.width;
  for (int i = threadIdx.x; i < tile.count * width; i += blockDim.x) {
    const int r = i / width, o = i % width;
    T *x = memory + layer.x + r * layer.x_stride + o, *slope = memory + layer.slope + r * layer.slope_stride + o;
    const int64_t of_task = int64_t(task[r]) * width + o, of_chunk = int64_t(chunk[r]) * width + o;
    T da, a0;
    if (is_first) {
      da = p.from_task[of_task] + p.from_chunk[of_chunk];
      a0 = p.from_task0[of_task] + p.from_chunk0[of_chunk];
    } else {
      da = *x + (layer.bias[o] - layer.bias0[o]);
      a0 = layer.a0 ? T(0) : *slope + layer.bias0[o];
    }
    if (layer.a0) a0 = layer.a0[int64_t(task[r]) * p.num_chunks * width + of_chunk];
    const Activated<T> out = activate(p.activation, a0, da);
    x[0] = out.dx;
    x[layer.x0] = out.x0;
    *slope = out.slope;
  }
}

template <bool makes_a0, typename T>
__device__ void layer_forward(const Layer<T>& in, const Layer<T>& layer, Tile tile, T* memory) {
  const int outputs = tiles(layer.width);
  for (int i = threadIdx.x; i < tile.blocks * outputs; i += blockDim.x) {
    const int m = i / outputs, n = i % outputs;
    const T *x = memory + in.x + m * in.x_stride, *w = memory + layer.w + n * layer.w_stride;
    Block<T> da = {}, a0 = {};
    multiply_drift<makes_a0>(x, x + in.x0, tile.blocks * in.x_stride, w, w + padded(layer.width) * layer.w_stride,
                             outputs * layer.w_stride, in.width, da, a0);
#pragma unroll
    for (int a = 0; a < kSide; ++a)
#pragma unroll
      for (int b = 0; b < kSide; ++b) {
        const int r = m + a * tile.blocks, o = n + b * outputs;
        if (o >= layer.width) continue;
        memory[layer.x + r * layer.x_stride + o] = da[a][b];
        if (makes_a0) memory[layer.slope + r * layer.slope_stride + o] = a0[a][b];
      }
  }
}

// X'WX, added to ``gram``; the gradient of the last pre-activations, 2 WX (Y'V_H) times their slopes, in place of these; and
// x0 + dx in place of dx in all layers but the last
template <typename T>
__device__ void meet_columns(const Problem<T>& p, Tile tile, T* memory, double* gram) {
  const Layer<T>& last = p.layers[p.num_layers - 1];
  const T *x = memory + last.x, *weight = memory + p.row_weight;
  const auto* table = reinterpret_cast<const unsigned char*>(memory + p.tile_table);
  const int num_grams = gram_tiles(p.full), outputs = tiles(p.width);
  for (int item = threadIdx.x; item < num_grams + tile.blocks * outputs; item += blockDim.x) {
    Block<T> sum = {};
    if (item < num_grams) {
      const int i = table[2 * item] * kSide, j = table[2 * item + 1] * kSide;
      multiply_tall(weight, x + i, last.x_stride, x + j, last.x_stride, tile.count, sum);
#pragma unroll
      for (int a = 0; a < kSide; ++a)
#pragma unroll
        for (int b = 0; b < kSide; ++b) gram[(a * kSide + b) * num_grams + item] += sum[a][b];
      continue;
    }
    const int m = (item - num_grams) / outputs, n = (item - num_grams) % outputs;
    multiply(x + m * last.x_stride, tile.blocks * last.x_stride, memory + p.to_h + n * kSide, spread(p.width), p.full, sum);
#pragma unroll
    for (int a = 0; a < kSide; ++a) {
      const int r = m + a * tile.blocks;
      const T w = weight[r];
#pragma unroll
      for (int b = 0; b < kSide; ++b) sum[a][b] *= w;
      multiply_into(sum[a], memory + last.slope + r * last.slope_stride + n * kSide);
    }
  }
  for (int l = 0; l + 1 < p.num_layers; ++l) {
    const Layer<T>& layer = p.layers[l];
    for (int i = threadIdx.x; i < tile.count * layer.width; i += blockDim.x) {
      T* at = memory + layer.x + i / layer.width * layer.x_stride + i % layer.width;
      *at += at[layer.x0];
    }
  }
}

// From the gradient g of the layer's pre-activations: g'(x0 + dx) and the sum of g, added to ``sums``, and g W times the
// slopes of the layer before, in place of these
template <typename T>
__device__ void layer_backward(const Layer<T>& in, const Layer<T>& layer, Tile tile, T* memory, T* sums) {
  const T* g = memory + layer.slope;
  const int outputs = tiles(layer.width), inputs = tiles(in.width), num_weights = outputs * inputs;
  for (int item = threadIdx.x; item < num_weights + tile.blocks * inputs + layer.width; item += blockDim.x) {
    Block<T> sum = {};
    if (item < num_weights) {
      const int o = item / inputs, i = item % inputs;
      multiply_tall(g + o * kSide, layer.slope_stride, memory + in.x + i * kSide, in.x_stride, 0, tile.count, 1, sum);
      T* to = sums + (o * kSide * inputs + i) * kSide;
#pragma unroll
      for (int a = 0; a < kSide; ++a) {
        T row[kSide];
        load4(to + a * inputs * kSide, row);
#pragma unroll
        for (int b = 0; b < kSide; ++b) row[b] += sum[a][b];
        store4(row, to + a * inputs * kSide);
      }
    } else if (item < num_weights + tile.blocks * inputs) {
      const int m = (item - num_weights) / inputs, n = (item - num_weights) % inputs;
      multiply(g + m * layer.slope_stride, tile.blocks * layer.slope_stride, memory + layer.w + n * kSide, layer.w_stride,
               layer.width, sum);
#pragma unroll
      for (int a = 0; a < kSide; ++a)
        multiply_into(sum[a], memory + in.slope + (m + a * tile.blocks) * in.slope_stride + n * kSide);
    } else {
      const int o = item - num_weights - tile.blocks * inputs;
      T total = 0;
      for (int r = 0; r < tile.count; ++r) total += g[r * layer.slope_stride + o];
      sums[num_weights * kSide * kSide + o] += total;
    }
  }
}

// Rows first, first + 1, ... of a group: trunk forward, drift, trunk backward
template <typename T>
__device__ void row_tile(const Problem<T>& p, int group, int first, int count, T* memory, double* gram, T* layer_sums) {
  const Tile tile{count, tiles(count)};
  int* task = reinterpret_cast<int*>(memory + p.row_place);
  int* chunk = task + p.row_tile;
  for (int r = threadIdx.x; r < tile.blocks * kSide; r += blockDim.x) {
    const int row = first + r - p.rows.start[group], chunks = p.chunk_cut[group + 1] - p.chunk_cut[group];
    task[r] = row / chunks;
    chunk[r] = p.chunk_cut[group] + row % chunks;
    memory[p.row_weight + r] = r < count ? p.task_weight[task[r]] : T(0);
  }
  __syncthreads();
  activate_rows(p, p.layers[0], true, tile, memory);
  __syncthreads();
  for (int l = 1; l < p.num_layers; ++l) {
    if (p.layers[l].a0)
      layer_forward<false>(p.layers[l - 1], p.layers[l], tile, memory);
    else
      layer_forward<true>(p.layers[l - 1], p.layers[l], tile, memory);
    __syncthreads();
    activate_rows(p, p.layers[l], false, tile, memory);
    __syncthreads();
  }
  meet_columns(p, tile, memory, gram);
  __syncthreads();
  for (int l = p.num_layers - 1; l > 0; --l) {
    layer_backward(p.layers[l - 1], p.layers[l], tile, memory, layer_sums + p.layers[l].sums);
    __syncthreads();
  }
  const Layer<T>& layer = p.layers[0];
  for (int i = threadIdx.x; i < count * layer.width; i += blockDim.x) {
    const int r = i / layer.width, o = i % layer.width;
    p.row_grad[(int64_t(task[r]) * p.num_chunks + chunk[r]) * layer.width + o] =
        memory[layer.slope + r * layer.slope_stride + o];
  }
  __syncthreads();
}

// Into rows that lie ``stride`` apart
template <typename T>
__device__ void load_weight(const T* weight, int outputs, int inputs, T* to, int stride) {
  constexpr int kLoads = 8;  // that are under way at once
  const int size = outputs * inputs, threads = blockDim.x;
  for (int base = threadIdx.x; base < size; base += kLoads * threads) {
    T w[kLoads];
#pragma unroll
    for (int q = 0; q < kLoads; ++q)
      if (base + q * threads < size) w[q] = weight[base + q * threads];
#pragma unroll
    for (int q = 0; q < kLoads; ++q) {
      const int e = base + q * threads;
      if (e < size) to[e / inputs * stride + e % inputs] = w[q];
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads, sizeof(T) == 4 ? 2 : 1) rows_kernel(const __grid_constant__ Problem<T> p) {
  T* memory = shared_memory<T>();
  const int tid = threadIdx.x, threads = blockDim.x, block = blockIdx.x, gram_size = p.gram_size();
  for (int i = tid; i < p.memory_size; i += threads) memory[i] = 0;
  T* layer_slot = p.layer_slots + int64_t(block) * p.layer_sums;
  T* layer_sums = p.sums_are_shared ? memory + p.shared_layer_sums : layer_slot;
  if (!p.sums_are_shared)
    for (int i = tid; i < p.layer_sums; i += threads) layer_slot[i] = 0;
  __syncthreads();
  for (int l = 1; l < p.num_layers; ++l) {
    const Layer<T>& layer = p.layers[l];
    const int inputs = p.layers[l - 1].width;
    T* w = memory + layer.w;
    load_weight(layer.weight, layer.width, inputs, w, layer.w_stride);
    load_weight(layer.weight0, layer.width, inputs, w + padded(layer.width) * layer.w_stride, layer.w_stride);
  }
  auto* table = reinterpret_cast<unsigned char*>(memory + p.tile_table);
  for (int i = tid; i < gram_tiles(p.full); i += threads) {
    const TileIndex at = gram_tile(i, tiles(p.full));
    table[2 * i] = static_cast<unsigned char>(at.i), table[2 * i + 1] = static_cast<unsigned char>(at.j);
  }
  const Layer<T>& last = p.layers[p.num_layers - 1];
  for (int r = tid; r < p.row_tile; r += threads) memory[last.x + r * last.x_stride + 2 * p.width] = 1;
  p.rows.for_parts(block, [&](int group, int lo, int hi) {
    double* slot = p.row_slots + int64_t(p.rows.slot(block, group)) * gram_size;
    double* gram = p.sums_are_shared ? reinterpret_cast<double*>(memory) : slot;
    for (int i = tid; i < gram_size; i += threads) gram[i] = 0;
#pragma unroll 4
    for (int i = tid; i < p.full * p.width; i += threads) {  // 2 Y'V_H
      const int m = i / p.width, h = i % p.width;
      T sum = 0;
      for (int s = 0; s < p.columns.num_parts; ++s)
        if (p.covers[group][s])
          sum += T(2 * p.covers[group][s] * gram_at(p.column_grams + int64_t(s) * gram_size, tiles(p.full), m, h));
      memory[p.to_h + m * spread(p.width) + h] = sum;
    }
    __syncthreads();
    for (int first = lo; first < hi; first += p.row_tile)
      row_tile(p, group, first, hi - first < p.row_tile ? hi - first : p.row_tile, memory, gram, layer_sums);
    if (p.sums_are_shared)
      for (int i = tid; i < gram_size; i += threads) slot[i] = gram[i];
    __syncthreads();
  });
  if (p.sums_are_shared)
    for (int i = tid; i < p.layer_sums; i += threads) layer_slot[i] = layer_sums[i];
}

// ---- the end

// <X'WX, Y'Y> over all rectangles
template <typename T>
__device__ void set_value(const Problem<T>& p) {
  double* sums = shared_memory<double>();
  const int size = p.gram_size(), side = tiles(p.full);
  double sum = 0;
  for (int g = 0; g < p.rows.num_parts; ++g)
    for (int s = 0; s < p.columns.num_parts; ++s) {
      if (!p.covers[g][s]) continue;
      const double *rows = p.row_grams + int64_t(g) * size, *columns = p.column_grams + int64_t(s) * size;
      for (int i = threadIdx.x; i < p.full * p.full; i += kThreads)
        sum += p.covers[g][s] * gram_at(rows, side, i / p.full, i % p.full) * gram_at(columns, side, i / p.full, i % p.full);
    }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int i = 1; i < kThreads; ++i) sum += sums[i];
  *p.value = T(sum < 0 ? 0 : sum);
}

// d/dV = 2 Y (X'W [H | 1]), X'W [H | 1] = X'W [H* | 1] + X'W [dH | 0]
template <typename T>
__device__ void basis_gradient(const Problem<T>& p, int block) {
  const int k = p.width + 1, stride = spread(p.full), factor_stride = spread(k), side = tiles(p.full), outputs = tiles(k);
  T *y = shared_memory<T>(), *factor = y + p.last_tile * stride, *out = factor + padded(p.full) * factor_stride;
  for (int i = threadIdx.x; i < p.last_tile * stride + padded(p.full) * factor_stride; i += kThreads) y[i] = 0;
  __syncthreads();
  p.last_columns.for_parts(block, [&](int segment, int lo, int hi) {
#pragma unroll 4
    for (int i = threadIdx.x; i < p.full * k; i += kThreads) {
      const int m = i / k, j = i % k;
      double sum = 0;
      for (int g = 0; g < p.rows.num_parts; ++g) {
        if (!p.covers[g][segment]) continue;
        const double* gram = p.row_grams + int64_t(g) * p.gram_size();
        sum += p.covers[g][segment] * (gram_at(gram, side, m, p.width + j) + (j < p.width ? gram_at(gram, side, m, j) : 0));
      }
      factor[m * factor_stride + j] = T(2 * sum);
    }
    for (int first = lo; first < hi; first += p.last_tile) {
      const int count = hi - first < p.last_tile ? hi - first : p.last_tile, blocks = tiles(count);
      load_columns(p, first, count, y, stride);
      __syncthreads();
      for (int item = threadIdx.x; item < blocks * outputs; item += kThreads) {
        const int m = item / outputs, n = item % outputs;
        Block<T> sum = {};
        multiply(y + m * stride, blocks * stride, factor + n * kSide, factor_stride, p.full, sum);
#pragma unroll
        for (int a = 0; a < kSide; ++a)
#pragma unroll
          for (int b = 0; b < kSide; ++b)
            if (m + a * blocks < count && n * kSide + b < k) out[(m + a * blocks) * k + n * kSide + b] = sum[a][b];
      }
      __syncthreads();
      T* to = p.grad_basis + int64_t(first) * k;
      for (int i = threadIdx.x; i < count * k; i += kThreads) to[i] = out[i];
    }
    __syncthreads();
  });
}

// Blocks: the value, the first layer's gradients row by row, those of tasks' and of chunks' embeddings, of columns
template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1) finish_kernel(const __grid_constant__ Problem<T> p) {
  const Layer<T>& layer = p.layers[0];
  const int width = layer.width, depth = p.task_dim + p.chunk_dim;
  int64_t job = blockIdx.x;
  if (job == 0) return set_value(p);
  job -= 1;
  if (job < width) {
    T* grad = layer.grad_weight + job * depth;
    weighted_sum<T>(p.num_tasks, p.task_grad + job, width, p.embeddings, p.task_dim, p.num_tasks, p.task_dim,
                    [&](int e, double sum) { grad[e] = T(sum); });
    weighted_sum<T>(p.num_tasks, p.task_grad + job, width, nullptr, 0, 1, 1,
                    [&](int, double sum) { layer.grad_bias[job] = T(sum); });
    weighted_sum<T>(p.num_slices * p.num_chunks, p.chunk_grad + job, width, p.chunks, p.chunk_dim, p.num_chunks, p.chunk_dim,
                    [&](int z, double sum) { grad[p.task_dim + z] = T(sum); });
    return;
  }
  job -= width;
  if (job < p.num_tasks) {
    weighted_sum<T>(width, p.task_grad + job * width, 1, layer.weight, depth, width, p.task_dim,
                    [&](int e, double sum) { p.grad_embeddings[job * p.task_dim + e] = T(sum); });
    return;
  }
  job -= p.num_tasks;
  if (job < p.num_chunks) {
    T* grad = shared_memory<T>() + kThreads * sizeof(double) / sizeof(T);
    weighted_sum<T>(p.num_slices, nullptr, 0, p.chunk_grad + job * width, int64_t(p.num_chunks) * width, p.num_slices, width,
                    [&](int o, double sum) { grad[o] = T(sum); });
    weighted_sum<T>(width, grad, 1, layer.weight + p.task_dim, depth, width, p.chunk_dim,
                    [&](int z, double sum) { p.grad_chunks[job * p.chunk_dim + z] = T(sum); });
    return;
  }
  basis_gradient(p, static_cast<int>(job - p.num_chunks));
}

}  // namespace fasthyper::gpu
