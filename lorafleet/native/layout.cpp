// What both sides have to agree on: the Python side compares it once, when it loads the library.
#include "common.h"

using namespace lorafleet;

extern "C" __attribute__((visibility("default"))) void lorafleet_layout(int64_t* to) {
    const int64_t agreed[] = {BLOCK_ROWS, TILE_K, TILE_ROWS, PAGE_TOKENS, MOST_MODULES};
    std::memcpy(to, agreed, sizeof(agreed));
}
