// Memory for tables and their gradients: large, written and read at random rows.
//
// With pages of 4 KB nearly every row of a table misses the translation cache, and a gradient of
// half a gigabyte costs a hundred thousand page faults before anything is computed. Both allocators
// here ask for pages of 2 MB, which the system may or may not grant; small requests go to Torch's
// own allocator.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>

namespace peer::ops::cpu {

// Fresh memory, which reads as zero where it has not been written: pages exist once they are
// touched.
c10::Allocator& huge_pages();

// Memory whose freed blocks, a few of them, are kept for the next request of their size: what a
// training step frees, the next one needs, and pages that are still there cost no fault. Kept
// blocks are marked as free to the system, which takes their pages back when it runs short.
c10::Allocator& recycled_huge_pages();

// A contiguous tensor in such memory, uninitialised.
at::Tensor empty_in(c10::Allocator& allocator, at::IntArrayRef sizes, at::ScalarType dtype);

// A contiguous tensor of zeros, whose pages are made when they are first touched.
at::Tensor zeros_in_huge_pages(at::IntArrayRef sizes, at::ScalarType dtype);

}  // namespace peer::ops::cpu
