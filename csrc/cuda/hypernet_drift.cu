// The drift from the parameters on a GPU, for trunks whose weights fit the shared memory of a block (DESIGN E2, E5): reads
// the plan, decides where things lie and how work is shared, and launches. The kernels are in small_drift.cuh.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <iterator>
#include <tuple>
#include <vector>

#include "small_drift.cuh"

namespace fasthyper::gpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kColumnBlocks = 2;    // per processor
constexpr int kRowBlocks = 4;       // per processor, at most
constexpr int kFewestColumns = 32;  // of a block
constexpr int kFewestRows = 8;      // of a block
constexpr int kRowTiles[] = {32, 16, 8};
constexpr int kTasksOfSlice = 32, kMostSlices = 64;

template <typename T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Where rectangles begin and end, and what each group of chunks shares with each segment of columns
struct Grid {
  std::vector<int64_t> chunk_cuts, column_cuts;
  std::vector<std::vector<int>> covers;
};

std::vector<int64_t> cuts(const int64_t* plan, int64_t num_rows, int64_t stride, int64_t size) {
  std::vector<int64_t> all{0, size};
  for (int64_t i = 0; i < num_rows; ++i, plan += stride) all.insert(all.end(), {plan[0], plan[1]});
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  return all;
}

// Every rectangle in Gram form and over all tasks
bool is_plain(const Tensor& plan, int64_t num_tasks) {
  const int64_t* r = const_data<int64_t>(plan);
  for (int64_t i = 0; i < plan.size(0); ++i, r += plan.size(1))
    if (r[0] != 0 || (r[1] >= 0 && r[1] != num_tasks) || r[6]) return false;
  return true;
}

Grid make_grid(const Tensor& plan, int64_t num_chunks, int64_t chunk_size) {
  const int64_t *rows = const_data<int64_t>(plan), count = plan.size(0), stride = plan.size(1);
  Grid grid{cuts(rows + 2, count, stride, num_chunks), cuts(rows + 4, count, stride, chunk_size), {}};
  for (size_t g = 0; g + 1 < grid.chunk_cuts.size(); ++g) {
    grid.covers.emplace_back(grid.column_cuts.size() - 1, 0);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t* r = rows + i * stride;
      if (grid.chunk_cuts[g] < r[2] || r[3] < grid.chunk_cuts[g + 1]) continue;
      for (size_t s = 0; s + 1 < grid.column_cuts.size(); ++s)
        grid.covers[g][s] += r[4] <= grid.column_cuts[s] && grid.column_cuts[s + 1] <= r[5];
    }
  }
  return grid;
}

void check_interval(const char* what, int64_t lo, int64_t hi, int64_t size) {
  FASTHYPER_CHECK(0 <= lo && lo <= hi && hi <= size, "output_drift: a rectangle of the plan has ", what, " [", lo, ", ", hi,
                  "), which leaves the grid [0, ", size, ")");
}

void check_plan(const Tensor& plan, int64_t num_tasks, int64_t num_chunks, int64_t chunk_size) {
  const int64_t* r = const_data<int64_t>(plan);
  for (int64_t i = 0; i < plan.size(0); ++i, r += plan.size(1)) {
    check_interval("tasks", r[0], r[1] < 0 ? num_tasks : r[1], num_tasks);
    check_interval("chunks", r[2], r[3], num_chunks);
    check_interval("columns", r[4], r[5], chunk_size);
  }
}

// Elements of shared memory that a tile of columns takes in finish_kernel: [v | v - v0], what becomes of it, and its factor
template <typename T>
int64_t last_tile_elements(const Problem<T>& p, int columns) {
  return int64_t(columns) * (spread(p.full) + p.width + 1) + int64_t(padded(p.full)) * spread(p.width + 1);
}

// Sets where things lie in the shared memory of rows_kernel, with the most rows that fit; false if none do. Sums of a block
// lie there, too, if that takes no room from a second block of the processor.
template <typename T>
bool lay_out(Problem<T>& p, const Device& device) {
  const int gram_size = gram_tiles(p.full) * kSide * kSide;
  p.layer_sums = 0;
  for (int l = 1; l < p.num_layers; ++l) {
    p.layers[l].sums = p.layer_sums;
    p.layer_sums += padded(p.layers[l].width) * (padded(p.layers[l - 1].width) + 1);
  }
  const auto lay = [&](int row_tile, bool sums_are_shared) {
    p.row_tile = row_tile;
    p.sums_are_shared = sums_are_shared;
    int64_t size = sums_are_shared ? gram_size * int64_t(sizeof(double) / sizeof(T)) : 0;
    const auto take = [&](int64_t count) {
      const int64_t at = size;
      size += (count + kSide - 1) / kSide * kSide;
      return static_cast<int>(at);
    };
    p.shared_layer_sums = take(sums_are_shared ? p.layer_sums : 0);
    p.to_h = take(padded(p.full) * spread(p.width));
    for (int l = 0; l < p.num_layers; ++l) {
      Layer<T>& layer = p.layers[l];
      const bool is_last = l + 1 == p.num_layers;
      layer.x0 = is_last ? layer.width : padded(layer.width);
      layer.x_stride = spread(is_last ? p.full : 2 * padded(layer.width));
      layer.slope_stride = spread(layer.width);
      layer.x = take(int64_t(row_tile) * layer.x_stride);
      layer.slope = take(int64_t(row_tile) * layer.slope_stride);
      if (l == 0) continue;
      layer.w_stride = spread(p.layers[l - 1].width);
      layer.w = take(2 * int64_t(padded(layer.width)) * layer.w_stride);
    }
    p.row_weight = take(row_tile);
    p.row_place = take(2 * row_tile);
    p.tile_table = take(2 * gram_tiles(p.full) / sizeof(T) + 1);
    p.memory_size = static_cast<int>(size);
    return size * int64_t(sizeof(T));
  };
  p.last_tile = kColumns;
  while (p.last_tile > kFewestColumns / 4 &&
         last_tile_elements(p, p.last_tile) * int64_t(sizeof(T)) > device.shared_memory_of_block())
    p.last_tile /= 2;
  if (last_tile_elements(p, p.last_tile) * int64_t(sizeof(T)) > device.shared_memory_of_block()) return false;
  const int64_t limit = device.shared_memory_of_block();
  for (const int row_tile : kRowTiles) {
    const int64_t size = lay(row_tile, false), size_with_sums = lay(row_tile, true);
    if (size_with_sums <= (size <= limit / 2 ? limit / 2 : limit)) return true;
    if (lay(row_tile, false) <= limit) return true;
  }
  return false;
}

// What depends on shapes and the plan alone; false if they do not fit
template <typename T>
bool set_shapes(Problem<T>& p, const std::vector<Tensor>& theta, const Tensor& plan, int64_t num_tasks,
                const Device& device) {
  constexpr int64_t kMost = int64_t(1) << 30;
  const int64_t num_layers = (static_cast<int64_t>(theta.size()) - 2) / 2, num_chunks = theta[0].size(0);
  const int64_t chunk_size = theta.back().size(0);
  if (num_layers < 1 || num_layers > kMaxLayers || !is_plain(plan, num_tasks)) return false;
  if (num_chunks < 1 || num_tasks * num_chunks > kMost || chunk_size < 1 || chunk_size > kMost) return false;
  const Grid grid = make_grid(plan, num_chunks, chunk_size);
  if (grid.chunk_cuts.size() > kMaxParts + 1 || grid.column_cuts.size() > kMaxParts + 1) return false;
  p.num_tasks = static_cast<int>(num_tasks);
  p.num_chunks = static_cast<int>(num_chunks);
  p.num_layers = static_cast<int>(num_layers);
  p.chunk_dim = static_cast<int>(theta[0].size(1));
  p.task_dim = static_cast<int>(theta[1].size(1)) - p.chunk_dim;
  p.width = static_cast<int>(theta.back().size(1)) - 1;
  p.full = 2 * p.width + 1;
  for (int l = 0; l < p.num_layers; ++l) {
    const int64_t width = theta[2 * l + 1].size(0);
    if (width < 1 || width > kWidest) return false;
    p.layers[l].width = static_cast<int>(width);
  }
  p.rows.num_parts = static_cast<int>(grid.chunk_cuts.size()) - 1;
  p.columns.num_parts = static_cast<int>(grid.column_cuts.size()) - 1;
  for (int g = 0; g <= p.rows.num_parts; ++g) {
    p.chunk_cut[g] = static_cast<int>(grid.chunk_cuts[g]);
    p.rows.start[g] = p.num_tasks * p.chunk_cut[g];
  }
  for (int s = 0; s <= p.columns.num_parts; ++s) p.columns.start[s] = static_cast<int>(grid.column_cuts[s]);
  for (int g = 0; g < p.rows.num_parts; ++g)
    for (int s = 0; s < p.columns.num_parts; ++s) p.covers[g][s] = static_cast<unsigned char>(grid.covers[g][s]);
  return plan.size(0) < 256 && lay_out(p, device);
}

// Memory between kernels, of one tensor
class Scratch {
 public:
  template <typename T>
  void want(T*& pointer, int64_t count) {
    pointers_.push_back({reinterpret_cast<void**>(&pointer), size_});
    size_ += (count * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
  }
  Tensor make(const Tensor& like) const {
    const Tensor memory = torch::stable::new_empty(like, {std::max<int64_t>(size_, 1)}, ScalarType::Byte);
    for (const auto& [pointer, offset] : pointers_) *pointer = static_cast<char*>(memory.mutable_data_ptr()) + offset;
    return memory;
  }

 private:
  static constexpr int64_t kAlign = 256;
  std::vector<std::tuple<void**, int64_t>> pointers_;
  int64_t size_ = 0;
};

int round_up(int64_t n, int64_t unit) { return static_cast<int>((n + unit - 1) / unit * unit); }

int64_t div_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

template <typename T>
void run(Problem<T>& p, const Device& device, const Tensor& like) {
  const int processors = device.num_processors(), grams = gram_tiles(p.full), gram_size = grams * kSide * kSide;
  const int64_t num_columns = p.columns.num_units(), num_rows = p.rows.num_units(), width = p.layers[0].width;
  const auto blocks = [](int64_t units, int fewest, int64_t most) {
    return static_cast<int>(std::min(div_up(units, fewest), most));
  };
  p.gram_pieces = static_cast<int>(div_up(grams, kColumnThreads));
  p.piece_tiles = static_cast<int>(div_up(grams, p.gram_pieces));
  p.column_shares = std::clamp(kColumnThreads / p.piece_tiles, 1, 8);
  const int column_threads = round_up(p.piece_tiles * p.column_shares, 32);
  const size_t sums_bytes = p.piece_tiles * kSide * kSide * sizeof(double);
  const size_t column_bytes = std::max(sums_bytes, kColumns * padded(p.full) * sizeof(T));
  p.columns.num_blocks = blocks(num_columns, kFewestColumns, kColumnBlocks * processors);
  p.first_blocks = static_cast<int>(div_up((int64_t(p.num_tasks) + p.num_chunks) * width, column_threads));

  const size_t row_bytes = p.memory_size * sizeof(T);
  int widest = 0;
  for (int l = 0; l < p.num_layers; ++l) widest = std::max(widest, p.layers[l].width);
  const int row_threads = widest <= kWidest / 4 ? kRowThreads / 2 : kRowThreads;
  const int64_t resident = device.shared_memory_of_processor() / (row_bytes + 1024);  // the system takes 1024 of each
  p.rows.num_blocks = blocks(num_rows, kFewestRows, processors * std::clamp<int64_t>(resident, 1, kRowBlocks));

  p.tasks_of_slice = static_cast<int>(std::max<int64_t>(kTasksOfSlice, div_up(p.num_tasks, kMostSlices)));
  p.num_slices = static_cast<int>(div_up(p.num_tasks, p.tasks_of_slice));
  const int64_t gram_chunks = div_up(gram_size, kSumLanes);
  const int64_t sum_blocks =
      p.rows.num_parts * gram_chunks + div_up(p.layer_sums, kSumLanes) + p.num_tasks + int64_t(p.num_slices) * p.num_chunks;

  p.last_columns = p.columns;
  p.last_columns.num_blocks = blocks(num_columns, kFewestColumns, kColumnBlocks * processors);
  const size_t sum_bytes = kThreads * sizeof(double);
  const size_t finish_bytes = std::max(sum_bytes + kWidest * sizeof(T), last_tile_elements(p, p.last_tile) * sizeof(T));

  Scratch scratch;
  scratch.want(p.from_task, p.num_tasks * width);
  scratch.want(p.from_chunk, p.num_chunks * width);
  scratch.want(p.from_task0, p.num_tasks * width);
  scratch.want(p.from_chunk0, p.num_chunks * width);
  scratch.want(p.row_grad, num_rows * width);
  scratch.want(p.task_grad, p.num_tasks * width);
  scratch.want(p.chunk_grad, int64_t(p.num_slices) * p.num_chunks * width);
  scratch.want(p.column_slots, int64_t(p.columns.num_slots()) * gram_size);
  scratch.want(p.row_slots, int64_t(p.rows.num_slots()) * gram_size);
  scratch.want(p.column_grams, int64_t(p.columns.num_parts) * gram_size);
  scratch.want(p.row_grams, int64_t(p.rows.num_parts) * gram_size);
  scratch.want(p.layer_slots, int64_t(p.rows.num_blocks) * p.layer_sums);
  const Tensor memory = scratch.make(like);

  device.launch(columns_kernel<T>, p.first_blocks + int64_t(p.columns.num_blocks) * p.gram_pieces, column_threads,
                column_bytes, p);
  device.launch(sum_columns<T>, p.columns.num_parts * gram_chunks, kThreads, sum_bytes, p);
  device.launch(rows_kernel<T>, p.rows.num_blocks, row_threads, row_bytes, p);
  device.launch(sum_rows<T>, sum_blocks, kThreads, sum_bytes, p);
  device.launch(finish_kernel<T>, 1 + width + p.num_tasks + p.num_chunks + p.last_columns.num_blocks, kThreads, finish_bytes,
                p);
}

template <typename T>
Tensor call(Problem<T>& p, const Device& device, const std::vector<Tensor>& theta, const std::vector<Tensor>& theta0,
            const Tensor& embeddings, const Tensor& embeddings0, const std::vector<Tensor>& pre0, const Tensor& weight,
            const Tensor& grad_embeddings, const std::vector<Tensor>& grad_theta) {
  const Tensor value = torch::stable::new_empty(embeddings, {});
  p.embeddings = const_data<T>(embeddings);
  p.embeddings0 = const_data<T>(embeddings0);
  p.chunks = const_data<T>(theta[0]);
  p.chunks0 = const_data<T>(theta0[0]);
  p.basis = const_data<T>(theta.back());
  p.basis0 = const_data<T>(theta0.back());
  p.task_weight = const_data<T>(weight);
  p.value = data<T>(value);
  p.grad_embeddings = data<T>(grad_embeddings);
  p.grad_chunks = data<T>(grad_theta[0]);
  p.grad_basis = data<T>(grad_theta.back());
  const int lacking = p.num_layers - static_cast<int>(pre0.size());
  for (int l = 0; l < p.num_layers; ++l) {
    Layer<T>& layer = p.layers[l];
    layer.weight = const_data<T>(theta[2 * l + 1]);
    layer.bias = const_data<T>(theta[2 * l + 2]);
    layer.weight0 = const_data<T>(theta0[2 * l + 1]);
    layer.bias0 = const_data<T>(theta0[2 * l + 2]);
    layer.a0 = l < lacking ? nullptr : const_data<T>(pre0[l - lacking]);
    layer.grad_weight = data<T>(grad_theta[2 * l + 1]);
    layer.grad_bias = data<T>(grad_theta[2 * l + 2]);
  }
  [[maybe_unused]] const auto current = device.make_current();
  run(p, device, embeddings);
  return value;
}

// f(Problem of the tensor's type), which is all zero; of other types, false
template <typename F>
bool with_problem(const Tensor& like, const F& f) {
  if (like.scalar_type() == ScalarType::Float) {
    Problem<float> p{};
    return f(p);
  }
  if (like.scalar_type() != ScalarType::Double) return false;
  Problem<double> p{};
  return f(p);
}

// Whether small_hypernet_drift_fwd takes these shapes and this plan. True where: float32 or float64; 1 to 8 layers of widths
// 1 to 128, whose weights but the first layer's, twice, fit the shared memory of a block beside 8 rows; every rectangle in
// Gram form and over all tasks; chunks, and columns, cut in at most 16 parts where rectangles begin or end; T N and S at
// most 2^30.
bool small_hypernet_drift_fits(std::vector<Tensor> theta, Tensor plan, int64_t num_tasks) {
  plan = torch::stable::contiguous(plan);
  const Device device(theta[0].get_device_index());
  return with_problem(theta[0], [&](auto& p) { return set_shapes(p, theta, plan, num_tasks, device); });
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> small_hypernet_drift_fwd(std::vector<Tensor> theta,
                                                                         std::vector<Tensor> theta0, Tensor embeddings,
                                                                         Tensor embeddings0, std::vector<Tensor> pre0,
                                                                         Tensor /*gram0*/, Tensor weight, Tensor plan,
                                                                         int64_t activation, int64_t /*precision*/) {
  for (std::vector<Tensor>* list : {&theta, &theta0, &pre0})
    for (Tensor& t : *list) t = torch::stable::contiguous(t);
  for (Tensor* t : {&embeddings, &embeddings0, &weight, &plan}) *t = torch::stable::contiguous(*t);
  FASTHYPER_CHECK(0 <= activation && activation <= 4, "hypernet_drift: unknown activation code ", activation);
  const int64_t num_tasks = embeddings.size(0);
  check_plan(plan, num_tasks, theta[0].size(0), theta.back().size(0));
  const Device device(embeddings.get_device_index());
  const auto make = [&](const Tensor& like) {
    return num_tasks == 0 ? torch::stable::new_zeros(like, like.sizes()) : torch::stable::new_empty(like, like.sizes());
  };
  const Tensor grad_embeddings = make(embeddings);
  std::vector<Tensor> grad_theta;
  for (const Tensor& t : theta) grad_theta.push_back(make(t));
  Tensor value;
  const bool fits = with_problem(embeddings, [&](auto& p) {
    if (!set_shapes(p, theta, plan, num_tasks, device)) return false;
    p.activation = static_cast<Activation>(activation);
    value = num_tasks == 0
                ? torch::stable::new_zeros(embeddings, {})
                : call(p, device, theta, theta0, embeddings, embeddings0, pre0, weight, grad_embeddings, grad_theta);
    return true;
  });
  FASTHYPER_CHECK(fits, "small_hypernet_drift: shapes, types or plan do not fit; _small_hypernet_drift_fits tells");
  return {value, grad_embeddings, grad_theta};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTHYPER_LIBRARY, m) {
  m.def("_small_hypernet_drift_fits(Tensor[] theta, Tensor plan, int num_tasks) -> bool");
  m.def(
      "_small_hypernet_drift_fwd(Tensor[] theta, Tensor[] theta0, Tensor embeddings, Tensor embeddings0, Tensor[] pre0,"
      " Tensor gram0, Tensor weight, Tensor plan, int activation, int precision=3) -> (Tensor, Tensor, Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(FASTHYPER_LIBRARY, FASTHYPER_KEY, m) {
  m.impl("_small_hypernet_drift_fits", TORCH_BOX(&small_hypernet_drift_fits));
  m.impl("_small_hypernet_drift_fwd", TORCH_BOX(&small_hypernet_drift_fwd));
}

}  // namespace fasthyper::gpu
