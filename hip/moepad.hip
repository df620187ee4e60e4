// Level 6: the device image: all kernels of csrc/variants.def in one translation unit.
#include "route.hip"
#include "gate_up.hip"
#include "down.hip"
#include "codes.hip"
#include "gate_up_tile.hip"
#include "down_tile.hip"
#include "gate_up_warpgroup.hip"
#include "down_warpgroup.hip"
#include "gate_up_decoded.hip"
#include "down_decoded.hip"
#include "combine.hip"

#include "../csrc/variants.def"
