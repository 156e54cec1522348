// Memory for tables and their gradients: large, read and written at random rows.
//
// With pages of 4 KB, nearly every row of a table misses the TLB, and a gradient of half a gigabyte
// causes a hundred thousand page faults. Both allocators here request pages of 2 MB, which the
// system may grant. Small requests go to Torch's allocator.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>

namespace peer::ops::cpu {

// Fresh memory. It reads as zero until it is written, and a page takes memory once it is touched.
c10::Allocator& huge_pages();

// Memory from a cache of a few freed blocks. A training step allocates what the last one freed, and
// pages of cached blocks cost no fault. Cached blocks are marked as free, so the system reclaims
// their pages if it needs memory.
c10::Allocator& cached_huge_pages();

// A contiguous tensor in such memory, uninitialised.
at::Tensor empty_in(c10::Allocator& allocator, at::IntArrayRef sizes, at::ScalarType dtype);

// A contiguous tensor of zeros. A page takes memory once it is touched.
at::Tensor zeros_in_huge_pages(at::IntArrayRef sizes, at::ScalarType dtype);

// Makes the storage of a tensor from `huge_pages` larger without copying, so that its views stay
// valid, and returns whether it did. New memory reads as zero and takes memory once it is touched.
bool enlarge_in_huge_pages(const at::Tensor& tensor, size_t bytes);

}  // namespace peer::ops::cpu
