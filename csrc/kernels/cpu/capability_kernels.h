// What each capability defines, declared in its own namespace. For the sources that are compiled
// once per capability.
#pragma once

#include <cstdlib>
#include <new>

#include "kernels/cpu/capability.h"
#include "kernels/cpu/kernels.h"

namespace peer::cpu::PEER_CAPABILITY {

template <class Table>
void token_forward(const ExpertMlpForward<Table>&, int64_t first, int64_t last);
template <class Table>
void token_parts_forward(const ExpertMlpForward<Table>&,
                         accumulation_t<Table>* parts_out,
                         int64_t first,
                         int64_t last);
template <class Table>
void add_token_parts(const ExpertMlpForward<Table>&,
                     const accumulation_t<Table>* parts_out,
                     int64_t first,
                     int64_t last);
template <class Table>
void token_backward(const ExpertMlpBackward<Table>&, int64_t first, int64_t last);
template <class Real>
void gather_sum(const GatherSum<Real>&, int64_t first, int64_t last);

template <class Element>
void sum_chunks(const TableGrad<Element>&, int64_t first, int64_t last);
template <class Element>
void sum_split_segments(const TableGrad<Element>&, int64_t first, int64_t last);

template <class Table, class Source>
void update_rows(const TableUpdate<Table, Source>&, int64_t first, int64_t last);
template <class Table, class Source>
void update_chunks(const TableUpdate<Table, Source>&, int64_t first, int64_t last);
template <class Table, class Source>
void update_split_segments(const TableUpdate<Table, Source>&, int64_t first, int64_t last);

template <class Real>
void pack_keys(const PackKeys<Real>&, int64_t first, int64_t last);
template <class Real>
void retrieve(const ProductKeyTopk<Real>&, int64_t first, int64_t last);

// Uninitialised memory for one call, aligned to a cache line. (Not std::vector: its instantiations
// would be shared between the capabilities, see capability.h.)
template <class Element>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(
            static_cast<Element*>(::operator new(count * sizeof(Element), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  Element* data() { return data_; }
  const Element* data() const { return data_; }
  Element& operator[](int64_t i) { return data_[i]; }
  const Element& operator[](int64_t i) const { return data_[i]; }

 private:
  Element* data_;
};

}  // namespace peer::cpu::PEER_CAPABILITY
