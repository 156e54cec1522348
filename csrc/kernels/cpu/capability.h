// The sources of the CPU kernels are compiled once per capability (baseline, avx2, avx512), each
// time into a namespace of that name; dispatch.h picks a capability at run time.
//
// A kernel takes two files: the operator's header declares its function pointer, and the operator's
// source defines the function and sets the pointer. The table of an operator's pointers has one
// constant per capability, which the source defines under the name PEER_CAPABILITY.
//
// Everything that such a source defines, except that constant, must be static or live in that
// namespace. An inline function with external linkage would be one weak symbol for all
// capabilities, and the linker might keep the copy that an older processor cannot run. For the same
// reason these sources include no large headers, and comparators passed to <algorithm> are lambdas,
// which gives the instantiations internal linkage.
#pragma once

#ifndef PEER_CAPABILITY
#define PEER_CAPABILITY baseline
#endif
