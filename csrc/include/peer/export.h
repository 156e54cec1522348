// What the library shows to programs that link it.
#pragma once

// The library hides everything but what is declared with this.
#define PEER_API __attribute__((visibility("default")))
