/* Level 5: the documentation of moepad._core, one string per function, in numpydoc form with the
 * signature that inspect reads. Text only. */
#ifndef MPAD_DOCSTRINGS_H
#define MPAD_DOCSTRINGS_H

#define SIGNATURE_END "\n--\n\n"

static const char get_moe_padding_size_doc[] =
    "get_moe_padding_size($module, is_aiter_moe)" SIGNATURE_END
    "What SGLang pads expert weights to: 128, or 0 for no padding.\n"
    "\n"
    "Value for value SGLang's function of this name.\n"
    "\n"
    "Parameters\n"
    "----------\n"
    "is_aiter_moe : bool\n"
    "    AITER runs the layer; any object, by its truth.\n"
    "\n"
    "Returns\n"
    "-------\n"
    "int\n"
    "    128 with `is_aiter_moe`. Without it, 128 if the environment variable SGLANG_MOE_PADDING "
    "is\n"
    "    now an integer other than 0, as int() reads it, else 0.\n"
    "\n"
    "Raises\n"
    "------\n"
    "ValueError\n"
    "    SGLANG_MOE_PADDING is looked at and is no integer.\n";

static const char get_moe_weight_sizes_doc[] =
    "get_moe_weight_sizes($module, inter_dim, is_concat, is_packed, is_aiter_moe)" SIGNATURE_END
    "Rows of w13 and columns of w2 that SGLang allocates for an intermediate size.\n"
    "\n"
    "Value for value SGLang's function of this name, with a torch that has float4. The flags are "
    "any\n"
    "objects, by their truth.\n"
    "\n"
    "Parameters\n"
    "----------\n"
    "inter_dim : int\n"
    "    Intermediate size of one rank.\n"
    "is_concat : bool\n"
    "    w13 holds gate and up rows.\n"
    "is_packed : bool\n"
    "    Two 4-bit elements per stored one.\n"
    "is_aiter_moe : bool\n"
    "    Round w2's stored columns up to 128; without it nothing is padded, whatever\n"
    "    SGLANG_MOE_PADDING is.\n"
    "\n"
    "Returns\n"
    "-------\n"
    "(int, int, bool)\n"
    "    Rows of w13, stored columns of w2, and whether those columns were rounded up.\n"
    "\n"
    "Raises\n"
    "------\n"
    "TypeError\n"
    "    `inter_dim` is no integer.\n"
    "ValueError\n"
    "    `inter_dim` is negative.\n"
    "\n"
    "Notes\n"
    "-----\n"
    "Three answers are traps: without `is_concat` the rows of w13 stay unpadded beside a padded "
    "w2;\n"
    "packed without `is_concat` they are doubled; and an odd packed size is floored, so that the\n"
    "last column is lost. `moepad.plan` gives the sizes a layer needs in each of these cases.\n";

static const char plan_doc[] =
    "plan($module, n_hidden, n_inter, n_expert, gated, quant, dtype, block_n, block_k, tp_size, "
    "tp_rank, ep_size, ep_rank, split, align, bias)" SIGNATURE_END
    "The fields of `moepad.Plan` as a dict; see `moepad.plan`.\n";

#define FUSED_MOE_PARAMETERS                                                                       \
    "hidden_states, w13, w2, topk_weights, topk_ids, *, n_inter=None, n_hidden=None, "             \
    "activation='silu', gate_up='concat', quant='none', w13_scale=None, w2_scale=None, "           \
    "block=(128, 128), scale_phase=0, quant_activations='none', x_scale=None, h_scale=None, "      \
    "w13_bias=None, w2_bias=None, swiglu_alpha=1.702, swiglu_limit=None, expert_map=None, "        \
    "n_token=None, apply_router_weight_on_input=False, "                                           \
    "routed_scaling_factor=1.0, layout='plain', out=None, workspace=None, stream=None"

static const char fused_moe_doc[] =
    "fused_moe($module, " FUSED_MOE_PARAMETERS ")" SIGNATURE_END
    "Mixture of experts over padded weights, at the cost of their true size.\n"
    "\n"
    "out[m] = scaling * sum over j of weight[m, j] * W2_e act(W13_e x[m]), where e is the expert "
    "of\n"
    "slot j. A gated layer computes act(gate) * up. Nothing in a pad is read: it may hold any "
    "bytes.\n"
    "The result does not depend on the number of threads, nor on pads.\n"
    "\n"
    "Sizes: M tokens, k slots each, E experts, H the width, I the intermediate size, and Ip >= I\n"
    "what the tensors have room for. A tensor is a NumPy array, a torch CPU tensor or any object\n"
    "with DLPack on the host; its last dimension is contiguous, the others may have any stride.\n"
    "\n"
    "Parameters\n"
    "----------\n"
    "hidden_states : tensor, (M, H)\n"
    "    float32, bfloat16 (in NumPy ml_dtypes.bfloat16) or float16.\n"
    "w13 : tensor, (E, 2*Ip, H) or (E, Ip, H)\n"
    "    Of the dtype of `hidden_states`, or what `quant` says. Gated: gate rows [0, I), up rows\n"
    "    [Ip, Ip + I). With Ip rows the layer is not gated.\n"
    "w2 : tensor, (E, H, Ip)\n"
    "    As `w13`; columns [0, I) are used.\n"
    "topk_weights : tensor, (M, k)\n"
    "    float32, bfloat16 or float16.\n"
    "topk_ids : tensor, (M, k)\n"
    "    int32 or int64. -1 is a slot to skip; ids may repeat.\n"
    "n_inter : int, optional\n"
    "    I; Ip if not given. 0 is legal.\n"
    "n_hidden : int, optional\n"
    "    H where `hidden_states` is wider: columns from there on are not read, and zero in the\n"
    "    result.\n"
    "activation : str\n"
    "    'silu', 'gelu', 'gelu_tanh' or 'swigluoai' (clamped, times up + 1) with a gate; 'silu',\n"
    "    'gelu' or 'relu2' without.\n"
    "gate_up : str\n"
    "    'concat': as above. 'interleaved': rows of w13 are gate 0, up 0, gate 1, ...\n"
    "quant : str\n"
    "    What w13 and w2 store; a weight is the stored value times its scale, and activations "
    "stay\n"
    "    as they are. With R the rows of w13 and up(a/b) the quotient rounded up:\n"
    "\n"
    "    * 'none';\n"
    "    * 'fp8_tensor': float8 e4m3fn, e4m3fnuz or e5m2; scales float32 (E,) or, of a gated w13,\n"
    "      (E, 2) for gate and up;\n"
    "    * 'fp8_channel': the same; scales float32 (E, R) and (E, H);\n"
    "    * 'fp8_block': the same; scales float32 (E, 2*nb, up(H/bk)), nb rows per half, and\n"
    "      (E, up(H/bn), at least up((scale_phase+I)/bk)), with nb at least "
    "up((scale_phase+I)/bn);\n"
    "      gate_up='concat' only;\n"
    "    * 'mxfp8': float8 e4m3fn; 'mxfp4': uint8 with two e2m1, that of even k in the low half, "
    "so\n"
    "      that the last dimension is halved; scales e8m0 (uint8 or float8_e8m0fnu)\n"
    "      (E, R, up(H/32)) and (E, H, up(Ip/32));\n"
    "    * 'int8_channel': int8; scales as for 'fp8_channel';\n"
    "    * 'int4_group': uint8 with two values + 8 as in 'mxfp4'; scales float32, bfloat16 or\n"
    "      float16 (E, R, up(H/g)) and (E, H, up(Ip/g)).\n"
    "\n"
    "    On a GPU blocks of 'fp8_block' are powers of two, and gfx90a takes e5m2 weights with\n"
    "    bfloat16 only.\n"
    "w13_scale, w2_scale : tensor\n"
    "    See `quant`. Padded like the weights, and no more read than they are in the pad.\n"
    "block : (int, int)\n"
    "    'fp8_block': (bn, bk), multiples of 32. 'int4_group': (1, g), g being 32, 64 or 128.\n"
    "scale_phase : int\n"
    "    'fp8_block': how far inside its scale block the first column lies (`Plan.scale_phase`), "
    "a\n"
    "    multiple of 32; rows of each half of w13 and columns of w2 are counted from there.\n"
    "quant_activations : str\n"
    "    What x and h = act(W13 x) are rounded to before they are multiplied. 'none': h to the\n"
    "    dtype of `hidden_states`. 'fp8', with 'fp8_tensor', 'fp8_channel' and 'fp8_block': "
    "float8\n"
    "    e4m3, fnuz where the weights are. 'int8', with 'int8_channel'. A row has one scale, with\n"
    "    'fp8_block' one for each bk columns. 'mxfp8', with 'mxfp8' and 'mxfp4', and 'mxfp4', "
    "with\n"
    "    'mxfp4': e4m3fn and e2m1, 32 columns with a power of two (OCP MX). On RDNA GPUs: 'none'.\n"
    "x_scale, h_scale : tensor, (1,), optional\n"
    "    float32: fixed scales of x and of h, as checkpoints have them, in place of those made of\n"
    "    each row's values. Not with 'mxfp8' and 'mxfp4'.\n"
    "w13_bias : tensor, (E, rows of w13), optional\n"
    "    float32, bfloat16 or float16, laid out like the rows of w13.\n"
    "w2_bias : tensor, (E, H), optional\n"
    "    float32, bfloat16 or float16; inside the weighted sum.\n"
    "swiglu_alpha : float\n"
    "    'swigluoai' is gate * sigmoid(alpha * gate) * (up + 1).\n"
    "swiglu_limit : float, optional\n"
    "    Before a gated activation, gate is clamped from above and up on both sides.\n"
    "expert_map : tensor, (E_global,), optional\n"
    "    int32 or int64: ids in `topk_ids` to experts held here, -1 for one held elsewhere, whose\n"
    "    slots are skipped.\n"
    "n_token : int or tensor of one int, optional\n"
    "    Rows from there on are not read, and zero in the result.\n"
    "apply_router_weight_on_input : bool\n"
    "    The routed weight multiplies the sums of W13 x, before the bias, instead of the result.\n"
    "routed_scaling_factor : float\n"
    "    Multiplies the final sum.\n"
    "layout : str\n"
    "    'plain': row-major. torch.ops.moepad.fused_moe (import moepad.torch) takes others.\n"
    "out : tensor, (M, H), optional\n"
    "    Written and returned; of the dtype of `hidden_states`. May be `hidden_states`, and may "
    "not\n"
    "    share memory with anything else.\n"
    "workspace : tensor or writable buffer, optional\n"
    "    Scratch memory of at least `workspace_nbytes` bytes at an address aligned to 64. Without\n"
    "    it the engine keeps its own.\n"
    "stream : None\n"
    "    For devices that have streams.\n"
    "\n"
    "Returns\n"
    "-------\n"
    "tensor, (M, H)\n"
    "    `out`, or else a new tensor of the kind and dtype of `hidden_states`: a NumPy array, a "
    "torch\n"
    "    tensor, what the producer's DLPack exchange API makes, or, for a producer without one, a\n"
    "    NumPy array.\n"
    "\n"
    "Raises\n"
    "------\n"
    "TypeError\n"
    "    An argument is missing, unknown or of a wrong kind or dtype, or a tensor requires grad "
    "under\n"
    "    torch's grad mode: this function is forward only.\n"
    "ValueError\n"
    "    A shape, value, stride, alignment or overlap is wrong; an expert id is out of range. "
    "`out`\n"
    "    is as it was.\n"
    "UnsupportedError\n"
    "    No kernel for the quantisation, layout or device; the message lists those considered.\n"
    "MemoryError\n"
    "    No memory for the result or the engine's scratch.\n"
    "\n"
    "Examples\n"
    "--------\n"
    ">>> import numpy as np, moepad\n"
    ">>> x, ids, weights = np.ones((5, 64), np.float32), np.zeros((5, 1), int), np.ones((5, 1))\n"
    ">>> w13, w2 = np.zeros((1, 512, 64), np.float32), np.zeros((1, 64, 256), np.float32)\n"
    ">>> moepad.fused_moe(x, w13, w2, weights.astype(np.float32), ids, n_inter=192).shape\n"
    "(5, 64)\n";

static const char workspace_nbytes_doc[] =
    "workspace_nbytes($module, " FUSED_MOE_PARAMETERS ")" SIGNATURE_END
    "Bytes of `workspace` that `fused_moe` needs for a call with these arguments.\n"
    "\n"
    "The number depends on their shapes and types, not on their values, the threads or the pads.\n"
    "\n"
    "Parameters\n"
    "----------\n"
    "As for `fused_moe`; `out` and `workspace` are not looked at.\n"
    "\n"
    "Returns\n"
    "-------\n"
    "int\n"
    "\n"
    "Raises\n"
    "------\n"
    "What `fused_moe` raises for the same arguments.\n";

static const char time_fused_moe_doc[] =
    "time_fused_moe($module, repeat, /, *args, **kwargs)" SIGNATURE_END
    "Seconds of each of `repeat` runs of the engine on one call of `fused_moe`.\n"
    "\n"
    "The arguments are parsed and checked once, so that kernel time and the cost of a call from\n"
    "Python can be told apart.\n"
    "\n"
    "Parameters\n"
    "----------\n"
    "repeat : int\n"
    "    By position.\n"
    "*args, **kwargs\n"
    "    As for `fused_moe`.\n"
    "\n"
    "Returns\n"
    "-------\n"
    "list of float\n"
    "\n"
    "Raises\n"
    "------\n"
    "What `fused_moe` raises.\n";

static const char copy_doc[] =
    "copy($module, dst, src)" SIGNATURE_END
    "Copy the elements of `src` to those of `dst`, by many threads if they are many.\n"
    "\n"
    "Parameters\n"
    "----------\n"
    "dst, src : tensor\n"
    "    Of one shape, of at most four dimensions, and of one element size, 1, 2, 4 or 8 bytes; "
    "the\n"
    "    dtypes may differ, bytes are copied. Any strides: stepped, transposed, negative; `src` "
    "may\n"
    "    be broadcast. Bytes between the elements of `dst` are not touched.\n"
    "\n"
    "Raises\n"
    "------\n"
    "TypeError\n"
    "    Not a tensor, or another element size.\n"
    "ValueError\n"
    "    Another shape, a read-only or broadcast `dst`, or memory shared by both.\n"
    "UnsupportedError\n"
    "    A tensor is not in host memory.\n";

static const char set_num_threads_doc[] =
    "set_num_threads($module, n)" SIGNATURE_END
    "Set the number of threads of later calls in this process.\n"
    "\n"
    "Parameters\n"
    "----------\n"
    "n : int\n"
    "    0: the default, MOEPAD_NUM_THREADS, else OMP_NUM_THREADS, else the physical cores this\n"
    "    process may run on.\n"
    "\n"
    "Raises\n"
    "------\n"
    "TypeError, ValueError\n"
    "    Not an integer, or out of range.\n";

static const char get_num_threads_doc[] =
    "get_num_threads($module)" SIGNATURE_END "Number of threads a call uses at most.\n"
    "\n"
    "Returns\n"
    "-------\n"
    "int\n";

static const char set_cpu_isa_doc[] =
    "set_cpu_isa($module, name)" SIGNATURE_END
    "Choose the instruction set of later calls in this process.\n"
    "\n"
    "Parameters\n"
    "----------\n"
    "name : str or None\n"
    "    One of `cpu_isas()`; None: MOEPAD_CPU_ISA, else the best.\n"
    "\n"
    "Raises\n"
    "------\n"
    "TypeError\n"
    "    Neither None nor a str.\n"
    "ValueError\n"
    "    Not available on this machine.\n";

static const char cpu_isa_doc[] =
    "cpu_isa($module)" SIGNATURE_END "Name of the instruction set in use.\n"
    "\n"
    "Returns\n"
    "-------\n"
    "str\n"
    "\n"
    "Raises\n"
    "------\n"
    "ValueError\n"
    "    MOEPAD_CPU_ISA names none that is available.\n";

static const char cpu_isas_doc[] =
    "cpu_isas($module)" SIGNATURE_END
    "Names of the instruction sets compiled in and usable on this machine, best first.\n"
    "\n"
    "Returns\n"
    "-------\n"
    "tuple of str\n";

static const char read_bandwidth_doc[] =
    "read_bandwidth($module, array)" SIGNATURE_END
    "Measure the speed of reading an array once with the threads of a call.\n"
    "\n"
    "Parameters\n"
    "----------\n"
    "array : tensor\n"
    "    Contiguous; larger than the caches, to measure memory.\n"
    "\n"
    "Returns\n"
    "-------\n"
    "float\n"
    "    Bytes per second.\n"
    "\n"
    "Raises\n"
    "------\n"
    "TypeError, ValueError, UnsupportedError\n"
    "    Not a tensor; empty or not contiguous; not in host memory.\n";

static const char peak_flops_doc[] =
    "peak_flops($module, dtype, seconds)" SIGNATURE_END
    "Measure the best instruction set's product, whichever is in use, with the threads of a call.\n"
    "\n"
    "Parameters\n"
    "----------\n"
    "dtype : str\n"
    "    'f32', 'bf16' or 'f16'.\n"
    "seconds : float\n"
    "    For how long.\n"
    "\n"
    "Returns\n"
    "-------\n"
    "float\n"
    "    Floating point operations per second, a multiply-add counted as two.\n"
    "\n"
    "Raises\n"
    "------\n"
    "TypeError, ValueError\n"
    "    An argument is of a wrong kind, or out of range.\n";

static const char gpu_report_doc[] =
    "gpu_report($module)" SIGNATURE_END "Look for GPU runtimes and devices; opens what it finds.\n"
    "\n"
    "Returns\n"
    "-------\n"
    "list of dict\n"
    "    Per vendor: 'vendor', 'library' (its path, or empty), 'tried' (each candidate's origin,\n"
    "    path, verdict and whether it was taken), 'devices' (index, name, arch, multiprocessors,\n"
    "    memory), 'error' (a message or None).\n";

static const char gpu_memory_doc[] =
    "gpu_memory($module, device_type, index, n_bytes, /)" SIGNATURE_END
    "A capsule that owns bytes of zeros on a GPU; `device_type` as DLPack numbers it.\n";

static const char gpu_export_doc[] =
    "gpu_export($module, memory, offset, dtype, itemsize, shape, strides, is_versioned, "
    "/)" SIGNATURE_END
    "A DLPack capsule of an array in such memory, which it keeps; offset and strides in bytes.\n";

static const char gpu_settle_doc[] = "gpu_settle($module, device_type, index, /)" SIGNATURE_END
                                     "Wait for all that is queued on a GPU, in whatever stream.\n";

static const char gpu_staging_doc[] =
    "gpu_staging($module, device_type, index, /)" SIGNATURE_END
    "A capsule that owns two pinned buffers through which `gpu_put` copies in turn.\n";

static const char gpu_put_doc[] = "gpu_put($module, staging, dst, src, /)" SIGNATURE_END
                                  "Copy an array of the host to one on the staging's GPU, which "
                                  "has it after `gpu_wait`; `src` may\n"
                                  "change meanwhile.\n";

static const char gpu_wait_doc[] =
    "gpu_wait($module, staging, /)" SIGNATURE_END "Wait for every copy of `gpu_put`.\n";

#undef SIGNATURE_END

#endif
