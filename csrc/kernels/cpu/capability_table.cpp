// The table of one capability's kernels, as dispatch.cpp offers it.
#include "kernels/cpu/capability_kernels.h"
#include "kernels/cpu/sub_scores.h"

namespace peer::cpu::PEER_CAPABILITY {

namespace {

template <class Table, class Source>
constexpr UpdateKernels<Table, Source> update_kernels() {
  return {update_rows<Table, Source>, update_chunks<Table, Source>,
          update_split_segments<Table, Source>};
}

template <class Table>
constexpr ExpertKernels<Table> expert_kernels() {
  return {
      token_forward<Table>,
      token_parts_forward<Table>,
      add_token_parts<Table>,
      token_backward<Table>,
      sum_chunks<Table>,
      sum_split_segments<Table>,
      update_kernels<Table, accumulation_t<Table>>(),
      update_kernels<Table, Table>(),
  };
}

template <class Real>
constexpr ProductKeyTopkKernels<Real> retrieval_kernels() {
  return {kPanel<Real>, pack_keys<Real>, retrieve<Real>, gather_sum<Real>};
}

}  // namespace

extern const Kernels kernels;
constexpr Kernels kernels = {
    expert_kernels<float>(), expert_kernels<double>(),   expert_kernels<BFloat16>(),
    expert_kernels<Half>(),  retrieval_kernels<float>(), retrieval_kernels<double>(),
};

}  // namespace peer::cpu::PEER_CAPABILITY
