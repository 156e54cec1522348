// Retrieval by product keys: the k best of R·C experts for every token and head, exactly, without
// looking at R·C scores.
//
//   1. sub-scores   <q1, row_keys[r]>, then <q2, col_keys[c]>, of some queries, a chunk of keys
//                   at a time, in shared memory (sub_scores.h)
//   2. selection    the k best keys of each half of every query: of those kept so far and those of
//                   the chunk (selection.h)
//   3. pairs        of the sums row + column, only those that can be among the k best
//                   (kernels/product_key_topk.h)
//
// Shapes      query (T, H, dim_key)   keys (R or C, dim_key / 2), shared or for each head
//             scores, indices (T, H, k)
// One block   32 queries (16 of double) and one head. Warps share out the keys of a chunk for the
//             scores, then the queries for the selection. Two blocks fit on a multiprocessor, so
//             that one can multiply while the other selects
// Traffic     the keys once per block, from the second-level cache; nothing of size R or C per
//             query leaves the block
// Exactness   every sub-score is summed in an order that depends on dim_key alone; a pair's score
//             is one addition
// Order       higher score first; among equal scores the smaller (row rank, column rank), where
//             ranks break ties by the smaller key id. Scores are compared as ordered integers
//             (ordered.h), so NaN ranks highest and -0 equals 0
// Requires    k up to kMaxRetrieved and R·C; R, C and dim_key below 2^31. Nothing of alignments:
//             elements that are not packed are read one by one
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/selection.h"
#include "kernels/cuda/sub_scores.h"
#include "kernels/product_key_topk.h"

namespace peer::cuda {

namespace {

// A lane's share of a chunk's scores stays in registers.
constexpr int kScoresPerLane = 16;
constexpr int kMaxKeysPerChunk = kScoresPerLane * kWarp;
// A query's scores, once they are in registers, make room for its list of candidates.
constexpr int kFewestKeysPerChunk = 256;

constexpr int kMaxPairs = count_candidate_pairs<int>(kMaxRetrieved, kMaxRetrieved, kMaxRetrieved);
constexpr int kPairsPerLane = (kMaxPairs + kWarp - 1) / kWarp;

constexpr int kMaxThreads = 512;

// The two halves of a query.
constexpr int kRows = 0, kColumns = 1;

template <class Real>
__device__ ordered_t<Real> infinity_order(Real sign) {
  return to_ordered(sign * std::numeric_limits<Real>::infinity());
}

// One half of a query's candidates, in shared memory. Read and written by one warp.
template <class Real>
struct BestKeys {
  using Order = ordered_t<Real>;

  int64_t count;  // of all keys
  int k;
  Candidate<Order>* sorted;  // the k best, or all
  // The keys of score -inf, which may be last in order and yet belong to one of the best pairs: how
  // many, and the first k of them.
  int* minus_infinities;
  int32_t* minus_infinity_ids;

  // Takes a chunk's scores into account, and overwrites them. The block meets before the next one.
  __device__ void add_chunk(Order* chunk, int chunk_keys, int32_t first_key) const {
    Order scores[kScoresPerLane];
#pragma unroll
    for (int i = 0; i < kScoresPerLane; ++i) {
      const int position = position_in_lane(i);
      scores[i] = position < chunk_keys ? chunk[position] : kBelowAll<Order>;
    }
    note_minus_infinities(scores, first_key);
    __syncwarp();
    // Every chunk but the last has more than k keys.
    const int kept = first_key == 0 ? 0 : k;
    const int wanted = std::min(k, chunk_keys);
    auto* list = reinterpret_cast<Candidate<Order>*>(chunk);
    for (int i = lane(); i < kept; i += kWarp) {
      list[i] = sorted[i];
    }
    const Order floor = kept > 0 ? sorted[k - 1].order : floor_by_groups(scores, wanted);
    const int length = append_above(floor, scores, wanted, first_key, list, kept);
    __syncwarp();
    if (length > kept) {
      visit_best(list, length, k,
                 [&](int rank, const Candidate<Order>& key) { sorted[rank] = key; });
    }
  }

  // How many of the best have that score.
  __device__ int count_of(Order order) const {
    int equal = 0;
#pragma unroll 1
    for (int i = 0; i < k && i < count; ++i) {
      equal += sorted[i].order == order;
    }
    return equal;
  }

 private:
  __device__ void note_minus_infinities(const Order (&scores)[kScoresPerLane],
                                        int32_t first_key) const {
    int noted = first_key == 0 ? 0 : *minus_infinities;
    const Order order = infinity_order(Real(-1));
    bool is_there = false;
#pragma unroll
    for (int i = 0; i < kScoresPerLane; ++i) {
      is_there |= scores[i] == order;
    }
    if (__any_sync(kAllLanes, is_there)) {
#pragma unroll
      for (int i = 0; i < kScoresPerLane; ++i) {
        const unsigned equals = __ballot_sync(kAllLanes, scores[i] == order);
        const int place = noted + count_before(equals);
        if (scores[i] == order && place < k) {
          minus_infinity_ids[place] = first_key + position_in_lane(i);
        }
        noted += __popc(equals);
      }
    }
    if (lane() == 0) {
      *minus_infinities = noted;
    }
  }
};

struct alignas(2) RankPair {
  uint8_t row, column;
};

// What a block keeps in shared memory: where, in bytes from its beginning.
template <class Query>
class Workspace {
 public:
  using Real = accumulation_t<Query>;
  using Order = ordered_t<Real>;
  static constexpr int kQueries = kQueriesPerBlock<Query>;

  Workspace(int k, int keys_per_chunk)
      : k_(k),
        keys_per_chunk_(keys_per_chunk),
        sorted_(kScores + kQueries * score_stride() * int(sizeof(Order))),
        minus_infinities_(sorted_ + 2 * kQueries * k * int(sizeof(Candidate<Order>))),
        minus_infinity_ids_(minus_infinities_ + 2 * kQueries * int(sizeof(int))),
        pairs_(minus_infinity_ids_ + 2 * kQueries * k * int(sizeof(int32_t))),
        bytes_(pairs_ + kMaxPairs * int(sizeof(RankPair))) {}

  int bytes() const { return bytes_; }
  PEER_HOST_DEVICE int keys_per_chunk() const { return keys_per_chunk_; }

  // (kQueries, at least keys_per_chunk). Eight more to a row, so that the four lanes that store
  // eight scores of a query and those beside them, of the next queries, meet in no bank.
  __device__ ScoreRows<Real> scores() const { return {at<Order>(kScores), score_stride()}; }
  __device__ Pack<Query>* stage() const { return at<Pack<Query>>(0); }
  __device__ RankPair* pairs() const { return at<RankPair>(pairs_); }
  __device__ BestKeys<Real> best(int axis, int query, int64_t keys) const {
    const int list = axis * kQueries + query;
    return {keys, k_, at<Candidate<Order>>(sorted_) + list * k_, at<int>(minus_infinities_) + list,
            at<int32_t>(minus_infinity_ids_) + list * k_};
  }

 private:
  template <class Item>
  __device__ static Item* at(int byte) {
    return reinterpret_cast<Item*>(peer_shared_memory + byte);
  }

  static constexpr int kScores = Stage<Query>::kBytes;
  PEER_HOST_DEVICE int score_stride() const { return keys_per_chunk_ + 8; }
  static_assert(kMaxCandidates * sizeof(Candidate<Order>) <= kFewestKeysPerChunk * sizeof(Order));

  int k_;
  int keys_per_chunk_;
  int sorted_, minus_infinities_, minus_infinity_ids_, pairs_, bytes_;
};

// By all threads of the block.
__device__ void list_pairs(int row_count, int column_count, int k, RankPair* pairs) {
  for (int i = int(threadIdx.x); i < row_count; i += int(blockDim.x)) {
    const int first = count_candidate_pairs(i, column_count, k);
    for (int j = 0; j < count_candidate_columns(i, column_count, k); ++j) {
      pairs[first + j] = {uint8_t(i), uint8_t(j)};
    }
  }
}

// A query's candidates, and where its result goes.
template <class Real>
struct PairSelection {
  using Order = ordered_t<Real>;

  BestKeys<Real> rows, columns;
  const RankPair* pairs;
  int count;
  int k;
  Real* scores;
  int64_t* indices;

  __device__ Order sum(int pair) const {
    const Real row = from_ordered<Real>(rows.sorted[pairs[pair].row].order);
    const Real column = from_ordered<Real>(columns.sorted[pairs[pair].column].order);
    return to_ordered(row + column);
  }

  __device__ int64_t expert(int pair) const {
    return rows.sorted[pairs[pair].row].id * columns.count + columns.sorted[pairs[pair].column].id;
  }

  __device__ void write(int rank, Order order, int64_t expert) const {
    scores[rank] = from_ordered<Real>(order);
    indices[rank] = expert;
  }

  // A pair's position in the list decides between equal sums.
  __device__ void select(Candidate<Order>* list) const {
    Order sums[kPairsPerLane];
#pragma unroll
    for (int i = 0; i < kPairsPerLane; ++i) {
      const int position = position_in_lane(i);
      sums[i] = position < count ? sum(position) : kBelowAll<Order>;
    }
    const int length = append_above(floor_by_groups(sums, k), sums, k, 0, list, 0);
    __syncwarp();
    visit_best(list, length, k, [&](int rank, const Candidate<Order>& pair) {
      write(rank, pair.order, expert(pair.id));
    });
  }
};

// The one case in which a sum of two halves is not monotone: infinities of opposite sign make NaN,
// which ranks highest although one of its halves may be last in its list. Then the candidates are
// the listed pairs and, of the pairs of +inf and -inf, the first k that are not listed. Keys of
// +inf and of rank k or more can be left out: k pairs that make NaN, too, come before theirs.
//
// Every lane compares some candidates with all, each computed anew: slow, and rare.
template <class Real>
class OppositeInfinities {
 public:
  using Order = ordered_t<Real>;

  // Whether there are such pairs.
  __device__ static bool meet(const BestKeys<Real>& rows, const BestKeys<Real>& columns) {
    return (*rows.minus_infinities > 0 && columns.count_of(infinity_order(Real(1))) > 0) ||
           (*columns.minus_infinities > 0 && rows.count_of(infinity_order(Real(1))) > 0);
  }

  __device__ explicit OppositeInfinities(const PairSelection<Real>& listed)
      : listed_(listed), rows_(listed.rows), columns_(listed.columns) {}

  __device__ void select() const {
    const int k = listed_.k;
    const int count = listed_.count + 2 * k;
    for (int i = lane(); i < count; i += kWarp) {
      const Pair own = candidate(i);
      int before = 0;
      for (int j = 0; j < count && before < k; ++j) {
        const Pair other = candidate(j);
        before += other.order > own.order || (other.order == own.order && other.rank < own.rank);
      }
      if (before < k && own.order != kBelowAll<Order>) {
        listed_.write(before, own.order, own.expert);
      }
    }
  }

 private:
  struct Pair {
    Order order;
    int64_t rank;  // row rank · C + column rank
    int64_t expert;
  };

  struct Key {
    int64_t rank, id;
  };

  struct Infinities {
    BestKeys<Real> keys;
    int nans, positive, negative;

    __device__ explicit Infinities(const BestKeys<Real>& keys)
        : keys(keys),
          nans(keys.count_of(std::numeric_limits<Order>::max())),
          positive(keys.count_of(infinity_order(Real(1)))),
          negative(std::min(*keys.minus_infinities, keys.k)) {}

    __device__ int count(bool is_positive) const { return is_positive ? positive : negative; }
    __device__ Key key(bool is_positive, int i) const {
      return is_positive ? Key{nans + i, keys.sorted[nans + i].id}
                         : Key{keys.count - *keys.minus_infinities + i, keys.minus_infinity_ids[i]};
    }
  };

  __device__ Pair pair(Order order, const Key& row, const Key& column) const {
    const int64_t columns = listed_.columns.count;
    return {order, row.rank * columns + column.rank, row.id * columns + column.id};
  }

  // The listed pairs, k pairs of a row of +inf and a column of -inf, and k of the other kind; below
  // all where there are not so many.
  __device__ Pair candidate(int i) const {
    if (i < listed_.count) {
      const RankPair ranks = listed_.pairs[i];
      return pair(listed_.sum(i), {ranks.row, listed_.rows.sorted[ranks.row].id},
                  {ranks.column, listed_.columns.sorted[ranks.column].id});
    }
    i -= listed_.count;
    const bool is_positive_row = i < listed_.k;
    i -= is_positive_row ? 0 : listed_.k;
    const int columns = columns_.count(!is_positive_row);
    if (columns > 0 && i / columns < rows_.count(is_positive_row)) {
      const Key row = rows_.key(is_positive_row, i / columns);
      const Key column = columns_.key(!is_positive_row, i % columns);
      if (!is_candidate(row.rank, column.rank, listed_.k)) {
        return pair(std::numeric_limits<Order>::max(), row, column);
      }
    }
    return {kBelowAll<Order>, 0, 0};
  }

  PairSelection<Real> listed_;
  Infinities rows_, columns_;
};

// What is packed is read 16 bytes at a time.
struct Packed {
  bool queries, rows, columns;
};

template <class Query>
__global__ void __launch_bounds__(kMaxThreads)
    retrieve_kernel(ProductKeyTopk<Query> retrieval, Workspace<Query> workspace, Packed packed) {
  using Real = accumulation_t<Query>;
  const int k = int(retrieval.k);
  const int64_t head = blockIdx.x % retrieval.heads;
  const int64_t first_token = blockIdx.x / retrieval.heads * kQueriesPerBlock<Query>;
  const int64_t first_query = first_token * retrieval.heads + head;
  const int half_width = int(retrieval.half_width);
  const int64_t query_stride = 2 * retrieval.half_width;
  const int queries =
      int(std::min<int64_t>(kQueriesPerBlock<Query>, retrieval.tokens - first_token));
  const int warps = int(blockDim.x) / kWarp;
  const ScoreRows<Real> scores = workspace.scores();

  const int row_lists = int(std::min(retrieval.k, retrieval.rows.count));
  const int column_lists = int(std::min(retrieval.k, retrieval.columns.count));
  const int pairs = count_candidate_pairs(row_lists, column_lists, k);
  list_pairs(row_lists, column_lists, k, workspace.pairs());

  for (int axis = kRows; axis <= kColumns; ++axis) {
    const Keys<Query> keys = axis == kRows ? retrieval.rows : retrieval.columns;
    const HalfRows<Query> key_rows = {keys.data + head * keys.head_stride, half_width, keys.count,
                                      half_width, axis == kRows ? packed.rows : packed.columns};
    const HalfRows<Query> query_rows = {
        retrieval.query + first_query * query_stride + axis * half_width,
        retrieval.heads * query_stride, queries, half_width, packed.queries};
    for (int64_t first = 0; first < keys.count; first += workspace.keys_per_chunk()) {
      const int chunk = int(std::min<int64_t>(workspace.keys_per_chunk(), keys.count - first));
      score_chunk(query_rows, key_rows, first, chunk, workspace.stage(), scores);
      __syncthreads();
      for (int query = warp_in_block(); query < queries; query += warps) {
        workspace.best(axis, query, keys.count)
            .add_chunk(scores.data + query * scores.stride, chunk, int32_t(first));
      }
      __syncthreads();
    }
  }

  for (int query = warp_in_block(); query < queries; query += warps) {
    const int64_t target = (first_query + query * retrieval.heads) * retrieval.k;
    const PairSelection<Real> selection = {
        .rows = workspace.best(kRows, query, retrieval.rows.count),
        .columns = workspace.best(kColumns, query, retrieval.columns.count),
        .pairs = workspace.pairs(),
        .count = pairs,
        .k = k,
        .scores = retrieval.scores + target,
        .indices = retrieval.indices + target,
    };
    if (OppositeInfinities<Real>::meet(selection.rows, selection.columns)) {
      OppositeInfinities<Real>(selection).select();
    } else {
      selection.select(
          reinterpret_cast<Candidate<ordered_t<Real>>*>(scores.data + query * scores.stride));
    }
  }
}

// As many keys to a chunk as leave room for another block on the multiprocessor, on which each
// takes a KiB more than it asks for.
template <class Query>
Workspace<Query> plan_workspace(const ProductKeyTopk<Query>& retrieval) {
  constexpr int kReserved = 1 << 10;
  constexpr int kStep = 2 * kWarp;
  const int64_t room = (max_shared_bytes() - kReserved) / 2;
  const auto with_chunks_of = [&](int64_t keys) {
    return Workspace<Query>(int(retrieval.k), int(keys));
  };
  const int64_t keys = std::max(retrieval.rows.count, retrieval.columns.count);
  int64_t chunk = std::clamp<int64_t>((keys + kStep - 1) / kStep * kStep, kFewestKeysPerChunk,
                                      kMaxKeysPerChunk);
  while (chunk > kFewestKeysPerChunk && with_chunks_of(chunk).bytes() > room) {
    chunk -= kStep;
  }
  return with_chunks_of(chunk);
}

}  // namespace

template <class Query>
void product_key_topk(const ProductKeyTopk<Query>& given, const Context& context) {
  ProductKeyTopk<Query> retrieval = given;
  // To shared keys all queries are alike, so that one token's heads make a block too.
  if (retrieval.rows.head_stride == 0 && retrieval.columns.head_stride == 0) {
    retrieval.tokens *= retrieval.heads;
    retrieval.heads = 1;
  }
  const int64_t width = retrieval.half_width;
  const auto are_packed = [&](const Keys<Query>& keys) {
    return is_packed(keys.data, keys.head_stride, width);
  };
  const Packed packed = {is_packed(retrieval.query, 2 * width, width), are_packed(retrieval.rows),
                         are_packed(retrieval.columns)};
  constexpr int kQueries = kQueriesPerBlock<Query>;
  const int64_t blocks = (retrieval.tokens + kQueries - 1) / kQueries * retrieval.heads;
  const Workspace<Query> workspace = plan_workspace(retrieval);
  // A block alone on its multiprocessor takes all the registers there are.
  const int threads = blocks > sm_count() ? kMaxThreads / 2 : kMaxThreads;
  launch(retrieve_kernel<Query>, {blocks, threads, workspace.bytes()}, context.stream, retrieval,
         workspace, packed);
}

template void product_key_topk(const ProductKeyTopk<float>&, const Context&);
template void product_key_topk(const ProductKeyTopk<double>&, const Context&);
template void product_key_topk(const ProductKeyTopk<BFloat16>&, const Context&);
template void product_key_topk(const ProductKeyTopk<Half>&, const Context&);

}  // namespace peer::cuda
