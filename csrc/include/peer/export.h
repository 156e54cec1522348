// What the library shows to programs that link it.
#pragma once

// The library hides every symbol that is not declared with this macro.
#define PEER_API __attribute__((visibility("default")))
