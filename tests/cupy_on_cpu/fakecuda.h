// What both halves of the stand-in need: how a symbol is exported, and whose memory it is.
#pragma once

#define EXPORT extern "C" __attribute__((visibility("default")))

// Whether `p` points into an allocation of the "device".
bool on_device(const void* p);
