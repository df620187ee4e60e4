/* Level 7: the Python module moepad._core: its functions and their documentation, its state, and
 * the one place where a status becomes an exception. Parses arguments and carries results; sizes,
 * checks and work are below. Holds no GIL while the engine or a copy runs. */
#include <Python.h>

#include "copy.h"
#include "cpu.h"
#include "device.h"
#include "docstrings.h"
#include "memory.h"
#include "moe.h"
#include "plan.h"
#include "pool.h"
#include "tensor.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Names that arguments may be, in the order of their enum. */

static const char *const DTYPES[] = {
#define X(NAME, text, bits, code) text,
    MPAD_DTYPE_LIST(X)
#undef X
};
static const char *const QUANTS[] = {
#define X(NAME, text) text,
    MPAD_QUANT_LIST(X)
#undef X
};
static const char *const ACTS[] = {
#define X(NAME, text, gated, ungated) text,
    MPAD_ACT_LIST(X)
#undef X
};
static const char *const SPLITS[] = {
#define X(NAME, text) text,
    MPAD_SPLIT_LIST(X)
#undef X
};
static const char *const INPUTS[] = {
#define X(NAME, text) text,
    MPAD_INPUT_LIST(X)
#undef X
};
static const char *const GATE_UPS[] = {"concat", "interleaved"};
enum { GATE_UP_INTERLEAVED = 1 };

#define COUNT(array) (int)(sizeof(array) / sizeof *(array))

/* Signatures: every parameter's name, those that may be positional first. */

/* X(NAME, name): fused_moe, workspace_nbytes and, after repeat, time_fused_moe. */
#define FUSED_MOE_LIST(X)                                                                          \
    X(HIDDEN_STATES, hidden_states)                                                                \
    X(W13, w13)                                                                                    \
    X(W2, w2)                                                                                      \
    X(TOPK_WEIGHTS, topk_weights)                                                                  \
    X(TOPK_IDS, topk_ids)                                                                          \
    X(N_INTER, n_inter)                                                                            \
    X(N_HIDDEN, n_hidden)                                                                          \
    X(ACTIVATION, activation)                                                                      \
    X(GATE_UP, gate_up)                                                                            \
    X(QUANT, quant)                                                                                \
    X(W13_SCALE, w13_scale)                                                                        \
    X(W2_SCALE, w2_scale)                                                                          \
    X(BLOCK, block)                                                                                \
    X(SCALE_PHASE, scale_phase)                                                                    \
    X(QUANT_ACTIVATIONS, quant_activations)                                                        \
    X(X_SCALE, x_scale)                                                                            \
    X(H_SCALE, h_scale)                                                                            \
    X(W13_BIAS, w13_bias)                                                                          \
    X(W2_BIAS, w2_bias)                                                                            \
    X(SWIGLU_ALPHA, swiglu_alpha)                                                                  \
    X(SWIGLU_LIMIT, swiglu_limit)                                                                  \
    X(EXPERT_MAP, expert_map)                                                                      \
    X(N_TOKEN, n_token)                                                                            \
    X(WEIGHT_ON_INPUT, apply_router_weight_on_input)                                               \
    X(ROUTED_SCALING, routed_scaling_factor)                                                       \
    X(LAYOUT, layout)                                                                              \
    X(OUT, out)                                                                                    \
    X(WORKSPACE, workspace)                                                                        \
    X(STREAM, stream)

enum fused_moe_parameter {
#define X(NAME, name) P_##NAME,
    FUSED_MOE_LIST(X)
#undef X
        P_COUNT
};

typedef enum function {
    F_PADDING_SIZE,
    F_WEIGHT_SIZES,
    F_PLAN,
    F_FUSED_MOE,
    F_WORKSPACE_NBYTES,
    F_TIME_FUSED_MOE,
    F_COPY,
    F_SET_NUM_THREADS,
    F_SET_CPU_ISA,
    F_READ_BANDWIDTH,
    F_PEAK_FLOPS,
    F_COUNT
} function;

static const struct signature {
    const char *name;
    int n_required, n_positional, n_parameter;
    const char *parameter[P_COUNT];
} SIGNATURES[] = {
#define X(NAME, name) #name,
    [F_PADDING_SIZE] = {"get_moe_padding_size", 1, 1, 1, {"is_aiter_moe"}},
    [F_WEIGHT_SIZES] =
        {"get_moe_weight_sizes", 4, 4, 4, {"inter_dim", "is_concat", "is_packed", "is_aiter_moe"}},
    [F_PLAN] = {"plan",
                15,
                15,
                15,
                {"n_hidden", "n_inter", "n_expert", "gated", "quant", "dtype", "block_n", "block_k",
                 "tp_size", "tp_rank", "ep_size", "ep_rank", "split", "align", "bias"}},
    [F_FUSED_MOE] = {"fused_moe", 5, 5, P_COUNT, {FUSED_MOE_LIST(X)}},
    [F_WORKSPACE_NBYTES] = {"workspace_nbytes", 5, 5, P_COUNT, {FUSED_MOE_LIST(X)}},
    [F_TIME_FUSED_MOE] = {"time_fused_moe", 5, 5, P_COUNT, {FUSED_MOE_LIST(X)}},
    [F_COPY] = {"copy", 2, 2, 2, {"dst", "src"}},
    [F_SET_NUM_THREADS] = {"set_num_threads", 1, 1, 1, {"n"}},
    [F_SET_CPU_ISA] = {"set_cpu_isa", 1, 1, 1, {"name"}},
    [F_READ_BANDWIDTH] = {"read_bandwidth", 1, 1, 1, {"array"}},
    [F_PEAK_FLOPS] = {"peak_flops", 2, 2, 2, {"dtype", "seconds"}},
#undef X
};
_Static_assert(COUNT(SIGNATURES) == F_COUNT, "one signature per function");

typedef struct module_state {
    mpad_tensor_state tensors;
    PyObject *exceptions[MPAD_MEMORY + 1]; /* by mpad_code */
    PyObject *checkpoint_error;
    /* Interned, so that a keyword and most values are recognised by address. */
    PyObject *parameter[F_COUNT][P_COUNT];
    PyObject *act[COUNT(ACTS)];
} module_state;

static module_state *state_of(PyObject *module)
{
    return PyModule_GetState(module);
}

/* The one place where a fault becomes an exception; one that is set already stays. */
static PyObject *raise_status(const module_state *state, const mpad_status *status)
{
    if (!PyErr_Occurred())
        PyErr_SetString(state->exceptions[status->code], status->message);
    return NULL;
}

/* Arguments to an array of borrowed references, by parameter; NULL: not given. */

static const char *utf8(PyObject *text, PyObject **bytes)
{
    *bytes = PyUnicode_AsUTF8String(text);
    PyErr_Clear();
    return *bytes ? PyBytes_AsString(*bytes) : "?";
}

static int find_parameter(const module_state *state, function f, PyObject *keyword, int expected)
{
    const struct signature *signature = &SIGNATURES[f];
    int n = signature->n_parameter;
    for (int i = 0, at = expected; i < n; i++, at++) { /* callers mostly keep the order */
        at = at < n ? at : 0;
        if (state->parameter[f][at] == keyword)
            return at;
    }
    for (int i = 0; i < n; i++)
        if (PyUnicode_CompareWithASCIIString(keyword, signature->parameter[i]) == 0)
            return i;
    return -1;
}

static mpad_code take_keywords(const module_state *state, function f, PyObject *const *args,
                               PyObject *kwnames, PyObject **values, mpad_status *status)
{
    const struct signature *signature = &SIGNATURES[f];
    Py_ssize_t n = PyTuple_Size(kwnames);
    int at = -1;
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *keyword = PyTuple_GetItem(kwnames, i);
        at = find_parameter(state, f, keyword, at + 1);
        if (at < 0) {
            PyObject *bytes;
            mpad_fail(status, MPAD_TYPE, "%s: has no argument '%s'; help(moepad.%s) lists them",
                      signature->name, utf8(keyword, &bytes), signature->name);
            Py_XDECREF(bytes);
            return MPAD_TYPE;
        }
        MPAD_REQUIRE(!values[at], status, MPAD_TYPE, "%s: given twice, by position and by name",
                     signature->parameter[at]);
        values[at] = args[i];
    }
    return MPAD_OK;
}

static mpad_code take_arguments(const module_state *state, function f, PyObject *const *args,
                                Py_ssize_t n_arg, PyObject *kwnames, PyObject **values,
                                mpad_status *status)
{
    const struct signature *signature = &SIGNATURES[f];
    MPAD_REQUIRE(n_arg <= signature->n_positional, status, MPAD_TYPE,
                 "%s: expected at most %d positional arguments, got %zd; pass the others by name",
                 signature->name, signature->n_positional, n_arg);
    for (int i = 0; i < signature->n_parameter; i++)
        values[i] = i < n_arg ? args[i] : NULL;
    if (kwnames)
        MPAD_TRY(take_keywords(state, f, args + n_arg, kwnames, values, status));
    for (int i = 0; i < signature->n_required; i++)
        MPAD_REQUIRE(values[i], status, MPAD_TYPE, "%s: missing argument '%s'", signature->name,
                     signature->parameter[i]);
    return MPAD_OK;
}

/* Values of arguments. */

static bool is_given(PyObject *value)
{
    return value && value != Py_None;
}

static mpad_code fail_kind(const char *name, const char *expected, PyObject *value,
                           mpad_status *status)
{
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception))
        return mpad_fail(status, MPAD_TYPE, "%s", name);
    PyErr_Clear();
    char type[64];
    return mpad_fail(status, MPAD_TYPE, "%s: expected %s, got %s", name, expected,
                     mpad_type_name(value, type));
}

/* An int or what has __index__; a bool is taken for a misplaced flag. */
static mpad_code take_integer(const char *name, PyObject *value, int64_t least, int64_t *result,
                              mpad_status *status)
{
    if (mpad_is_bool(value) || !PyIndex_Check(value))
        return fail_kind(name, "an integer", value, status);
    PyObject *index = PyNumber_Index(value);
    if (!index)
        return fail_kind(name, "an integer", value, status);
    int is_over;
    *result = PyLong_AsLongLongAndOverflow(index, &is_over);
    Py_DECREF(index);
    MPAD_REQUIRE(is_over <= 0, status, MPAD_VALUE, "%s: expected an integer below 2**63, got more",
                 name);
    MPAD_REQUIRE(is_over == 0 && *result >= least, status, MPAD_VALUE,
                 is_over ? "%s: expected an integer of at least %" PRId64 ", got less than -2**63"
                         : "%s: expected an integer of at least %" PRId64 ", got %" PRId64,
                 name, least, *result);
    return MPAD_OK;
}

static mpad_code take_bool(const char *name, PyObject *value, bool *result, mpad_status *status)
{
    if (!mpad_is_bool(value))
        return fail_kind(name, "True or False", value, status);
    *result = PyObject_IsTrue(value) == 1;
    return MPAD_OK;
}

static mpad_code take_number(const char *name, PyObject *value, double *result, mpad_status *status)
{
    if (mpad_is_bool(value) || PyUnicode_Check(value) || PyBytes_Check(value))
        return fail_kind(name, "a number", value, status);
    *result = PyFloat_AsDouble(value);
    if (*result == -1.0 && PyErr_Occurred())
        return fail_kind(name, "a number", value, status);
    return MPAD_OK;
}

static mpad_code take_float32(const char *name, PyObject *value, float *result, mpad_status *status)
{
    double number = 0;
    MPAD_TRY(take_number(name, value, &number, status));
    *result = (float)number;
    MPAD_REQUIRE(isfinite(*result), status, MPAD_VALUE,
                 "%s: expected a finite number within float32, got %g", name, number);
    return MPAD_OK;
}

static mpad_code fail_choice(const char *name, PyObject *value, const char *const *choices, int n,
                             mpad_status *status)
{
    char list[256] = "";
    for (int i = 0, at = 0; i < n; i++)
        at += snprintf(list + at, sizeof list - (size_t)at, "%s\"%s\"",
                       i == 0       ? ""
                       : i == n - 1 ? " or "
                                    : ", ",
                       choices[i]);
    PyObject *bytes;
    mpad_fail(status, MPAD_VALUE, "%s: expected %s, got \"%.64s\"", name, list,
              utf8(value, &bytes));
    Py_XDECREF(bytes);
    return MPAD_VALUE;
}

static mpad_code take_choice(const char *name, PyObject *value, const char *const *choices, int n,
                             int *result, mpad_status *status)
{
    if (!PyUnicode_Check(value))
        return fail_kind(name, "a name (str)", value, status);
    for (*result = 0; *result < n; ++*result)
        if (PyUnicode_CompareWithASCIIString(value, choices[*result]) == 0)
            return MPAD_OK;
    return fail_choice(name, value, choices, n, status);
}

/* One call of the fused MoE. */

typedef struct call {
    mpad_moe_args args;
    mpad_moe moe;
    mpad_leases leases;
    PyObject *out; /* strong */
    void *workspace;
    int64_t workspace_bytes;
    mpad_gpu *gpu; /* NULL: the CPU engine */
    int gpu_part;
    void *stream;
} call;

static const mpad_tensor TENSOR_OF[] = {
    [P_HIDDEN_STATES] = MPAD_TENSOR_HIDDEN_STATES,
    [P_W13] = MPAD_TENSOR_W13,
    [P_W2] = MPAD_TENSOR_W2,
    [P_TOPK_WEIGHTS] = MPAD_TENSOR_TOPK_WEIGHTS,
    [P_TOPK_IDS] = MPAD_TENSOR_TOPK_IDS,
    [P_W13_SCALE] = MPAD_TENSOR_W13_SCALE,
    [P_W2_SCALE] = MPAD_TENSOR_W2_SCALE,
    [P_X_SCALE] = MPAD_TENSOR_X_SCALE,
    [P_H_SCALE] = MPAD_TENSOR_H_SCALE,
    [P_W13_BIAS] = MPAD_TENSOR_W13_BIAS,
    [P_W2_BIAS] = MPAD_TENSOR_W2_BIAS,
    [P_EXPERT_MAP] = MPAD_TENSOR_EXPERT_MAP,
    [P_N_TOKEN] = MPAD_TENSOR_N_TOKEN,
};

static mpad_code take_tensor(module_state *state, int parameter, PyObject *value, call *c,
                             mpad_status *status)
{
    mpad_tensor tensor = TENSOR_OF[parameter];
    c->args.have[tensor] = true;
    return mpad_tensor_acquire(&state->tensors, value, mpad_tensor_name(tensor), false,
                               &c->args.view[tensor], &c->leases, status);
}

static mpad_code take_n_token(module_state *state, PyObject *value, call *c, mpad_status *status)
{
    if (!PyLong_Check(value) && mpad_tensor_check(&state->tensors, value))
        return take_tensor(state, P_N_TOKEN, value, c, status);
    return take_integer("n_token", value, 0, &c->args.n_token, status);
}

static mpad_code take_activation(const module_state *state, PyObject *value, call *c,
                                 mpad_status *status)
{
    int act = 0;
    while (act < COUNT(ACTS) && state->act[act] != value)
        act++;
    if (act == COUNT(ACTS))
        MPAD_TRY(take_choice("activation", value, ACTS, COUNT(ACTS), &act, status));
    c->args.act = (mpad_act)act;
    return MPAD_OK;
}

static mpad_code take_swiglu(PyObject *const *values, call *c, mpad_status *status)
{
    if (values[P_SWIGLU_ALPHA])
        MPAD_TRY(
            take_float32("swiglu_alpha", values[P_SWIGLU_ALPHA], &c->args.swiglu_alpha, status));
    if (!is_given(values[P_SWIGLU_LIMIT]))
        return MPAD_OK;
    double limit = 0;
    MPAD_TRY(take_number("swiglu_limit", values[P_SWIGLU_LIMIT], &limit, status));
    MPAD_REQUIRE(limit >= 0, status, MPAD_VALUE,
                 "swiglu_limit: expected None or a number of at least 0, got %g", limit);
    c->args.swiglu_limit = (float)limit;
    return MPAD_OK;
}

/* What only quantised weights have. */
static mpad_code take_quant(module_state *state, PyObject *const *values, call *c,
                            mpad_status *status)
{
    int quant = MPAD_QUANT_NONE;
    if (values[P_QUANT])
        MPAD_TRY(take_choice("quant", values[P_QUANT], QUANTS, COUNT(QUANTS), &quant, status));
    mpad_moe_args *args = &c->args;
    args->quant = (mpad_quant)quant;
    PyObject *block = values[P_BLOCK];
    args->have_block = block != NULL;
    if (block) {
        if (!PyTuple_Check(block) || PyTuple_Size(block) != 2)
            return fail_kind("block", "a tuple of two integers (rows, columns)", block, status);
        MPAD_TRY(take_integer("block[0]", PyTuple_GetItem(block, 0), 1, &args->block_n, status));
        MPAD_TRY(take_integer("block[1]", PyTuple_GetItem(block, 1), 1, &args->block_k, status));
    }
    args->scale_phase = 0;
    if (values[P_SCALE_PHASE])
        MPAD_TRY(take_integer("scale_phase", values[P_SCALE_PHASE], 0, &args->scale_phase, status));
    int input = MPAD_INPUT_NONE;
    if (values[P_QUANT_ACTIVATIONS])
        MPAD_TRY(take_choice("quant_activations", values[P_QUANT_ACTIVATIONS], INPUTS,
                             COUNT(INPUTS), &input, status));
    args->input = (mpad_input)input;
    static const int scales[] = {P_W13_SCALE, P_W2_SCALE, P_X_SCALE, P_H_SCALE};
    for (int i = 0; i < COUNT(scales); i++)
        if (is_given(values[scales[i]]))
            MPAD_TRY(take_tensor(state, scales[i], values[scales[i]], c, status));
    return MPAD_OK;
}

static mpad_code take_options(module_state *state, PyObject *const *values, call *c,
                              mpad_status *status)
{
    mpad_moe_args *args = &c->args;
    if (is_given(values[P_N_INTER]))
        MPAD_TRY(take_integer("n_inter", values[P_N_INTER], 0, &args->n_inter, status));
    if (is_given(values[P_N_HIDDEN]))
        MPAD_TRY(take_integer("n_hidden", values[P_N_HIDDEN], 0, &args->n_hidden, status));
    if (values[P_ACTIVATION])
        MPAD_TRY(take_activation(state, values[P_ACTIVATION], c, status));
    int choice = 0;
    if (values[P_GATE_UP])
        MPAD_TRY(
            take_choice("gate_up", values[P_GATE_UP], GATE_UPS, COUNT(GATE_UPS), &choice, status));
    args->is_interleaved = choice == GATE_UP_INTERLEAVED;
    MPAD_TRY(take_quant(state, values, c, status));
    MPAD_TRY(take_swiglu(values, c, status));
    if (is_given(values[P_N_TOKEN]))
        MPAD_TRY(take_n_token(state, values[P_N_TOKEN], c, status));
    if (values[P_WEIGHT_ON_INPUT])
        MPAD_TRY(take_bool("apply_router_weight_on_input", values[P_WEIGHT_ON_INPUT],
                           &args->is_weight_on_input, status));
    if (values[P_ROUTED_SCALING])
        MPAD_TRY(take_float32("routed_scaling_factor", values[P_ROUTED_SCALING],
                              &args->routed_scaling, status));
    PyObject *layout = values[P_LAYOUT];
    if (!layout)
        return MPAD_OK;
    if (!PyUnicode_Check(layout))
        return fail_kind("layout", "a name (str)", layout, status);
    MPAD_REQUIRE(PyUnicode_CompareWithASCIIString(layout, "plain") == 0, status, MPAD_UNSUPPORTED,
                 "layout: no kernel for weights laid out otherwise than \"plain\"; considered: the "
                 "CPU engine and the GPU engine (row-major only); pass w13 and w2 in row-major "
                 "order, or torch tensors to torch.ops.moepad.fused_moe (import moepad.torch), "
                 "which keeps row-major copies of other layouts");
    return MPAD_OK;
}

/* The engine of the tensors' device, its stream, and the bytes it needs. */
static mpad_code take_engine(module_state *state, PyObject *const *values, call *c,
                             mpad_status *status)
{
    PyObject *stream = values[P_STREAM];
    mpad_device device = c->args.view[MPAD_TENSOR_HIDDEN_STATES].device;
    c->gpu = NULL;
    c->workspace_bytes = 0;
    if (device.vendor == MPAD_HOST) {
        MPAD_REQUIRE(!is_given(stream), status, MPAD_VALUE,
                     "stream: expected None for tensors on the CPU, which has no streams");
        c->workspace_bytes = mpad_cpu_workspace_bytes(&c->moe);
        return MPAD_OK;
    }
    if (is_given(stream))
        MPAD_TRY(mpad_device_take_stream(stream, &c->stream, status));
    else
        MPAD_TRY(mpad_tensor_stream(&state->tensors, values[P_HIDDEN_STATES], device, &c->stream,
                                    status));
    MPAD_TRY(mpad_device_find(device, &c->gpu, status));
    return mpad_gpu_needs(c->gpu, &c->moe, &c->workspace_bytes, &c->gpu_part, status);
}

/* Everything but out and workspace, checked. */
static mpad_code take_call(module_state *state, PyObject *const *values, call *c,
                           mpad_status *status)
{
    memset(c->args.have, 0, sizeof c->args.have);
    c->args.n_inter = c->args.n_hidden = c->args.n_token = MPAD_MOE_DEFAULT;
    c->args.act = MPAD_ACT_SILU;
    c->args.is_weight_on_input = false;
    c->args.routed_scaling = 1.0f;
    c->args.swiglu_alpha = 1.702f;
    c->args.swiglu_limit = INFINITY;
    for (int p = P_HIDDEN_STATES; p <= P_TOPK_IDS; p++)
        MPAD_TRY(take_tensor(state, p, values[p], c, status));
    if (is_given(values[P_W13_BIAS]))
        MPAD_TRY(take_tensor(state, P_W13_BIAS, values[P_W13_BIAS], c, status));
    if (is_given(values[P_W2_BIAS]))
        MPAD_TRY(take_tensor(state, P_W2_BIAS, values[P_W2_BIAS], c, status));
    if (is_given(values[P_EXPERT_MAP]))
        MPAD_TRY(take_tensor(state, P_EXPERT_MAP, values[P_EXPERT_MAP], c, status));
    MPAD_TRY(take_options(state, values, c, status));
    MPAD_TRY(mpad_moe_check(&c->args, &c->moe, status));
    return take_engine(state, values, c, status);
}

static mpad_code take_out(module_state *state, PyObject *const *values, call *c,
                          mpad_status *status)
{
    mpad_moe_args *args = &c->args;
    if (is_given(values[P_OUT])) {
        c->out = values[P_OUT];
        Py_INCREF(c->out);
    } else {
        c->out = mpad_tensor_new_like(&state->tensors, values[P_HIDDEN_STATES],
                                      &args->view[MPAD_TENSOR_HIDDEN_STATES], status);
        if (!c->out)
            return status->code;
    }
    args->have[MPAD_TENSOR_OUT] = true;
    MPAD_TRY(mpad_tensor_acquire(&state->tensors, c->out, "out", true, &args->view[MPAD_TENSOR_OUT],
                                 &c->leases, status));
    return mpad_moe_bind_out(args, &c->moe, status);
}

/* On a GPU: the framework's own memory, which knows its current stream; where there is no such
 * framework, or the stream is another one, NULL, and the engine takes its own. */
static mpad_code make_workspace(module_state *state, PyObject *const *values, call *c,
                                mpad_status *status)
{
    if (!c->gpu || c->workspace_bytes == 0)
        return MPAD_OK;
    if (is_given(values[P_STREAM]))
        return MPAD_OK;
    return mpad_tensor_lease_bytes(&state->tensors, values[P_HIDDEN_STATES],
                                   c->args.view[MPAD_TENSOR_HIDDEN_STATES].device,
                                   c->workspace_bytes, &c->workspace, &c->leases, status);
}

static mpad_code take_workspace(module_state *state, PyObject *const *values, call *c,
                                mpad_status *status)
{
    PyObject *value = values[P_WORKSPACE];
    c->workspace = NULL;
    if (!is_given(value))
        return make_workspace(state, values, c, status);
    mpad_view *view = &c->args.view[MPAD_TENSOR_WORKSPACE];
    c->args.have[MPAD_TENSOR_WORKSPACE] = true;
    MPAD_TRY(
        mpad_tensor_acquire_bytes(&state->tensors, value, "workspace", view, &c->leases, status));
    c->workspace = view->data;
    return mpad_moe_check_workspace(
        &c->args, c->workspace_bytes,
        c->gpu ? (int)MPAD_GPU_WORKSPACE_ALIGN : (int)MPAD_WORKSPACE_ALIGN, status);
}

/* Parses and checks a whole call; end_call follows in any case. */
static mpad_code begin_call(module_state *state, function f, PyObject *const *args,
                            Py_ssize_t n_arg, PyObject *kwnames, call *c, mpad_status *status)
{
    PyObject *values[P_COUNT];
    c->leases.n = 0;
    c->out = NULL;
    MPAD_TRY(take_arguments(state, f, args, n_arg, kwnames, values, status));
    MPAD_TRY(take_call(state, values, c, status));
    if (f == F_WORKSPACE_NBYTES)
        return MPAD_OK;
    if (c->gpu)
        MPAD_TRY(mpad_device_load(c->gpu, c->gpu_part, status));
    MPAD_TRY(take_out(state, values, c, status));
    return take_workspace(state, values, c, status);
}

static mpad_code run_call(const call *c, mpad_status *status)
{
    if (c->moe.n_token_pad == 0 || c->moe.n_hidden_pad == 0)
        return MPAD_OK;
    const mpad_view *n_token = &c->args.view[MPAD_TENSOR_N_TOKEN];
    bool is_on_device = c->args.have[MPAD_TENSOR_N_TOKEN] && n_token->device.vendor != MPAD_HOST;
    mpad_code code;
    Py_BEGIN_ALLOW_THREADS code =
        c->gpu ? mpad_gpu_run(c->gpu, &c->moe, is_on_device ? n_token->data : NULL,
                              is_on_device ? n_token->dtype : MPAD_DTYPE_I32, c->workspace,
                              c->stream, status)
               : mpad_cpu_run(&c->moe, c->workspace, status);
    Py_END_ALLOW_THREADS return code;
}

/* Gives back what the call borrowed, and its out to the caller. */
static PyObject *end_call(call *c)
{
    mpad_leases_end(&c->leases);
    return c->out;
}

static PyObject *fused_moe(PyObject *module, PyObject *const *args, Py_ssize_t n_arg,
                           PyObject *kwnames)
{
    module_state *state = state_of(module);
    mpad_status status;
    call c;
    mpad_code code = begin_call(state, F_FUSED_MOE, args, n_arg, kwnames, &c, &status);
    if (code == MPAD_OK)
        code = run_call(&c, &status);
    PyObject *out = end_call(&c);
    if (code == MPAD_OK)
        return out;
    Py_XDECREF(out);
    return raise_status(state, &status);
}

static PyObject *workspace_nbytes(PyObject *module, PyObject *const *args, Py_ssize_t n_arg,
                                  PyObject *kwnames)
{
    module_state *state = state_of(module);
    mpad_status status;
    call c;
    mpad_code code = begin_call(state, F_WORKSPACE_NBYTES, args, n_arg, kwnames, &c, &status);
    end_call(&c);
    if (code != MPAD_OK)
        return raise_status(state, &status);
    return PyLong_FromLongLong(c.workspace_bytes);
}

static double seconds_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static mpad_code time_call(const call *c, int64_t n, PyObject *times, mpad_status *status)
{
    for (int64_t i = 0; i < n; i++) {
        double start = seconds_now();
        MPAD_TRY(run_call(c, status));
        PyObject *seconds = PyFloat_FromDouble(seconds_now() - start);
        if (!seconds || PyList_SetItem(times, (Py_ssize_t)i, seconds) != 0 ||
            PyErr_CheckSignals() != 0)
            return mpad_fail(status, MPAD_MEMORY, "time_fused_moe");
    }
    return MPAD_OK;
}

static PyObject *time_fused_moe(PyObject *module, PyObject *const *args, Py_ssize_t n_arg,
                                PyObject *kwnames)
{
    module_state *state = state_of(module);
    mpad_status status;
    call c;
    c.leases.n = 0;
    c.out = NULL;
    int64_t n = 0;
    PyObject *times = NULL;
    mpad_code code = n_arg == 0 ? mpad_fail(&status, MPAD_TYPE,
                                            "time_fused_moe: missing argument "
                                            "'repeat', the first by position")
                                : take_integer("repeat", args[0], 0, &n, &status);
    if (code == MPAD_OK)
        code = begin_call(state, F_TIME_FUSED_MOE, args + 1, n_arg - 1, kwnames, &c, &status);
    if (code == MPAD_OK && !(times = PyList_New((Py_ssize_t)n)))
        code = mpad_fail(&status, MPAD_MEMORY, "repeat");
    if (code == MPAD_OK)
        code = time_call(&c, n, times, &status);
    Py_XDECREF(end_call(&c));
    if (code == MPAD_OK)
        return times;
    Py_XDECREF(times);
    return raise_status(state, &status);
}

/* SGLang's helpers. */

enum { MOE_PADDING = 128, PERIOD = 256 };

/* int(text) != 0 as Python has it, quickly where text is plain digits; -1 with an exception. */
static int is_nonzero_integer(const char *text)
{
    size_t n = strspn(text, "0123456789");
    if (n > 0 && n < 18 && text[n] == 0)
        return strspn(text, "0") != n;
    PyObject *string = PyUnicode_DecodeFSDefault(text);
    PyObject *number = string ? PyNumber_Long(string) : NULL;
    int answer = number ? PyObject_IsTrue(number) : -1;
    Py_XDECREF(number);
    Py_XDECREF(string);
    return answer;
}

static PyObject *get_moe_padding_size(PyObject *module, PyObject *const *args, Py_ssize_t n_arg,
                                      PyObject *kwnames)
{
    module_state *state = state_of(module);
    mpad_status status;
    PyObject *value = NULL;
    if (take_arguments(state, F_PADDING_SIZE, args, n_arg, kwnames, &value, &status) != MPAD_OK)
        return raise_status(state, &status);
    int is_padded = PyObject_IsTrue(value);
    if (is_padded == 0) {
        const char *text = getenv("SGLANG_MOE_PADDING");
        is_padded = text ? is_nonzero_integer(text) : 0;
    }
    return is_padded < 0 ? NULL : PyLong_FromLong(is_padded ? MOE_PADDING : 0);
}

static mpad_code take_inter_dim(PyObject *value, PyObject **number, int64_t *inter_dim,
                                int *is_over, mpad_status *status)
{
    *number = PyIndex_Check(value) ? PyNumber_Index(value) : NULL;
    if (!*number)
        return fail_kind("inter_dim", "an integer", value, status);
    *inter_dim = PyLong_AsLongLongAndOverflow(*number, is_over);
    MPAD_REQUIRE(*is_over >= 0 && (*is_over || *inter_dim >= 0), status, MPAD_VALUE,
                 "inter_dim: expected an integer of at least 0, got a negative one");
    *is_over |= *inter_dim > MPAD_WEIGHT_SIZES_MAX;
    return MPAD_OK;
}

/* count * per_period + rest, for sizes that C integers do not hold. */
static PyObject *add_periods(PyObject *count, int64_t per_period, int64_t rest)
{
    PyObject *factor = PyLong_FromLongLong(per_period), *term = PyLong_FromLongLong(rest);
    PyObject *product = factor && term ? PyNumber_Multiply(count, factor) : NULL;
    PyObject *sum = product ? PyNumber_Add(product, term) : NULL;
    Py_XDECREF(product);
    Py_XDECREF(factor);
    Py_XDECREF(term);
    return sum;
}

/* Sizes grow by the same amount with every PERIOD columns, so the rest of a division says all. */
static int large_weight_sizes(PyObject *number, const bool *flags, PyObject **w13, PyObject **w2,
                              bool *is_padded)
{
    PyObject *period = PyLong_FromLong(PERIOD);
    PyObject *count = period ? PyNumber_FloorDivide(number, period) : NULL;
    PyObject *rest = period ? PyNumber_Remainder(number, period) : NULL;
    if (count && rest) {
        int64_t w13_each, w2_each, w13_rest, w2_rest;
        mpad_moe_weight_sizes(PERIOD, flags[0], flags[1], flags[2], &w13_each, &w2_each, is_padded);
        mpad_moe_weight_sizes(PyLong_AsLongLong(rest), flags[0], flags[1], flags[2], &w13_rest,
                              &w2_rest, is_padded);
        *w13 = add_periods(count, w13_each, w13_rest);
        *w2 = add_periods(count, w2_each, w2_rest);
    }
    Py_XDECREF(rest);
    Py_XDECREF(count);
    Py_XDECREF(period);
    return *w13 && *w2 ? 0 : -1;
}

static PyObject *get_moe_weight_sizes(PyObject *module, PyObject *const *args, Py_ssize_t n_arg,
                                      PyObject *kwnames)
{
    module_state *state = state_of(module);
    mpad_status status;
    PyObject *values[4], *number = NULL, *w13 = NULL, *w2 = NULL, *result = NULL;
    int64_t inter_dim = 0, w13_up_dim, w2_down_dim;
    int is_over = 0;
    bool flags[3], is_padded;
    if (take_arguments(state, F_WEIGHT_SIZES, args, n_arg, kwnames, values, &status) != MPAD_OK ||
        take_inter_dim(values[0], &number, &inter_dim, &is_over, &status) != MPAD_OK) {
        raise_status(state, &status);
        goto done;
    }
    for (int i = 0; i < 3; i++) {
        int truth = PyObject_IsTrue(values[1 + i]);
        if (truth < 0)
            goto done;
        flags[i] = truth;
    }
    if (is_over) {
        if (large_weight_sizes(number, flags, &w13, &w2, &is_padded) != 0)
            goto done;
    } else {
        mpad_moe_weight_sizes(inter_dim, flags[0], flags[1], flags[2], &w13_up_dim, &w2_down_dim,
                              &is_padded);
        w13 = PyLong_FromLongLong(w13_up_dim);
        w2 = PyLong_FromLongLong(w2_down_dim);
    }
    if (w13 && w2)
        result = PyTuple_Pack(3, w13, w2, is_padded ? Py_True : Py_False);
done:
    Py_XDECREF(w2);
    Py_XDECREF(w13);
    Py_XDECREF(number);
    return result;
}

/* The plan. */

static mpad_code take_request(PyObject *const *values, mpad_plan_request *request,
                              mpad_status *status)
{
    const char *const *names = SIGNATURES[F_PLAN].parameter;
    struct {
        int index;
        int64_t *into;
    } integers[] = {
        {0, &request->n_hidden}, {1, &request->n_inter},  {2, &request->n_expert},
        {6, &request->block_n},  {7, &request->block_k},  {8, &request->tp_size},
        {9, &request->tp_rank},  {10, &request->ep_size}, {11, &request->ep_rank},
        {13, &request->align},
    };
    for (int i = 0; i < COUNT(integers); i++)
        MPAD_TRY(take_integer(names[integers[i].index], values[integers[i].index], INT64_MIN,
                              integers[i].into, status));
    int choice = 0;
    MPAD_TRY(take_choice("quant", values[4], QUANTS, COUNT(QUANTS), &choice, status));
    request->quant = (mpad_quant)choice;
    MPAD_TRY(take_choice("dtype", values[5], DTYPES, COUNT(DTYPES), &choice, status));
    request->dtype = (mpad_dtype)choice;
    MPAD_TRY(take_choice("split", values[12], SPLITS, COUNT(SPLITS), &choice, status));
    request->split = (mpad_split)choice;
    MPAD_TRY(take_bool("gated", values[3], &request->is_gated, status));
    return take_bool("bias", values[14], &request->have_bias, status);
}

/* Takes the reference to value. */
static bool put(PyObject *dict, const char *key, PyObject *steals_value)
{
    bool is_in = steals_value && PyDict_SetItemString(dict, key, steals_value) == 0;
    Py_XDECREF(steals_value);
    return is_in;
}

static PyObject *shape_tuple(const mpad_shape *shape)
{
    if (shape->n_dim == 0) {
        Py_INCREF(Py_None);
        return Py_None;
    }
    PyObject *tuple = PyTuple_New(shape->n_dim);
    for (int dim = 0; tuple && dim < shape->n_dim; dim++) {
        PyObject *size = PyLong_FromLongLong(shape->size[dim]);
        if (!size || PyTuple_SetItem(tuple, dim, size) != 0)
            Py_CLEAR(tuple);
    }
    return tuple;
}

static PyObject *plan_dict(const mpad_plan *plan)
{
    const struct {
        const char *key;
        int64_t value;
    } integers[] = {
        {"n_inter", plan->n_inter},
        {"n_inter_pad", plan->n_inter_pad},
        {"start", plan->start},
        {"stop", plan->stop},
        {"expert_start", plan->expert_start},
        {"expert_stop", plan->expert_stop},
        {"block_n", plan->block_n},
        {"block_k", plan->block_k},
        {"n_pack", plan->n_pack},
        {"scale_phase", plan->scale_phase},
        {"w13_scale_start", plan->w13_scale_start},
        {"w2_scale_start", plan->w2_scale_start},
        {"nbytes", plan->nbytes},
        {"pad_nbytes", plan->pad_nbytes},
    };
    const struct {
        const char *key;
        const mpad_shape *shape;
    } shapes[] = {
        {"w13_shape", &plan->w13},
        {"w2_shape", &plan->w2},
        {"w13_scale_shape", &plan->w13_scale},
        {"w2_scale_shape", &plan->w2_scale},
        {"w13_bias_shape", &plan->w13_bias},
        {"w2_bias_shape", &plan->w2_bias},
    };
    const struct {
        const char *key;
        mpad_dtype dtype;
    } dtypes[] = {
        {"storage_dtype", plan->storage_dtype},
        {"scale_dtype", plan->scale_dtype},
        {"bias_dtype", plan->bias_dtype},
    };
    PyObject *dict = PyDict_New();
    bool is_whole = dict != NULL;
    for (int i = 0; is_whole && i < COUNT(integers); i++)
        is_whole = put(dict, integers[i].key, PyLong_FromLongLong(integers[i].value));
    for (int i = 0; is_whole && i < COUNT(shapes); i++)
        is_whole = put(dict, shapes[i].key, shape_tuple(shapes[i].shape));
    for (int i = 0; is_whole && i < COUNT(dtypes); i++)
        is_whole = put(dict, dtypes[i].key, PyUnicode_FromString(DTYPES[dtypes[i].dtype]));
    if (!is_whole)
        Py_CLEAR(dict);
    return dict;
}

static PyObject *plan(PyObject *module, PyObject *const *args, Py_ssize_t n_arg, PyObject *kwnames)
{
    module_state *state = state_of(module);
    mpad_status status;
    PyObject *values[P_COUNT];
    mpad_plan_request request;
    mpad_plan made;
    mpad_code code = take_arguments(state, F_PLAN, args, n_arg, kwnames, values, &status);
    if (code == MPAD_OK)
        code = take_request(values, &request, &status);
    if (code == MPAD_OK)
        code = mpad_plan_make(&request, &made, &status);
    return code == MPAD_OK ? plan_dict(&made) : raise_status(state, &status);
}

/* Copies, threads, instruction sets, measurement. */

/* By the threads of the host, or on the current stream of the device that has one of the two. */
static mpad_code copy_views(module_state *state, PyObject *const *values, const mpad_view *dst,
                            const mpad_view *src, mpad_status *status)
{
    bool is_to_device = dst->device.vendor != MPAD_HOST;
    mpad_device device = is_to_device ? dst->device : src->device;
    mpad_gpu *gpu = NULL;
    void *stream = NULL;
    mpad_code code;
    if (device.vendor != MPAD_HOST) {
        MPAD_TRY(mpad_copy_check(dst, src, status));
        MPAD_TRY(mpad_tensor_stream(&state->tensors, values[is_to_device ? 0 : 1], device, &stream,
                                    status));
        MPAD_TRY(mpad_device_find(device, &gpu, status));
    }
    Py_BEGIN_ALLOW_THREADS code =
        gpu ? mpad_gpu_copy(gpu, dst, src, stream, status) : mpad_copy(dst, src, status);
    Py_END_ALLOW_THREADS return code;
}

static PyObject *copy(PyObject *module, PyObject *const *args, Py_ssize_t n_arg, PyObject *kwnames)
{
    module_state *state = state_of(module);
    mpad_status status;
    PyObject *values[2];
    mpad_view dst, src;
    mpad_leases leases = {.n = 0};
    mpad_code code = take_arguments(state, F_COPY, args, n_arg, kwnames, values, &status);
    if (code == MPAD_OK)
        code = mpad_tensor_acquire(&state->tensors, values[0], "dst", true, &dst, &leases, &status);
    if (code == MPAD_OK)
        code =
            mpad_tensor_acquire(&state->tensors, values[1], "src", false, &src, &leases, &status);
    if (code == MPAD_OK)
        code = copy_views(state, values, &dst, &src, &status);
    mpad_leases_end(&leases);
    if (code != MPAD_OK)
        return raise_status(state, &status);
    Py_RETURN_NONE;
}

static PyObject *set_num_threads(PyObject *module, PyObject *const *args, Py_ssize_t n_arg,
                                 PyObject *kwnames)
{
    module_state *state = state_of(module);
    mpad_status status;
    PyObject *value;
    int64_t n = 0;
    mpad_code code =
        take_arguments(state, F_SET_NUM_THREADS, args, n_arg, kwnames, &value, &status);
    if (code == MPAD_OK)
        code = take_integer("n", value, 0, &n, &status);
    if (code == MPAD_OK && n > MPAD_POOL_MAX_THREADS)
        code = mpad_fail(&status, MPAD_VALUE, "n: expected at most %d threads, got %" PRId64,
                         MPAD_POOL_MAX_THREADS, n);
    if (code != MPAD_OK)
        return raise_status(state, &status);
    mpad_pool_set_threads((int)n);
    Py_RETURN_NONE;
}

static PyObject *get_num_threads(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyLong_FromLong(mpad_pool_threads());
}

static mpad_code set_isa(PyObject *name, mpad_status *status)
{
    if (name == Py_None)
        return mpad_cpu_set_isa(NULL, status);
    if (!PyUnicode_Check(name))
        return fail_kind("name", "None or a name (str)", name, status);
    PyObject *bytes;
    mpad_code code = mpad_cpu_set_isa(utf8(name, &bytes), status);
    Py_XDECREF(bytes);
    return code;
}

static PyObject *set_cpu_isa(PyObject *module, PyObject *const *args, Py_ssize_t n_arg,
                             PyObject *kwnames)
{
    module_state *state = state_of(module);
    mpad_status status;
    PyObject *value;
    mpad_code code = take_arguments(state, F_SET_CPU_ISA, args, n_arg, kwnames, &value, &status);
    if (code == MPAD_OK)
        code = set_isa(value, &status);
    if (code != MPAD_OK)
        return raise_status(state, &status);
    Py_RETURN_NONE;
}

static PyObject *cpu_isa(PyObject *module, PyObject *unused)
{
    (void)unused;
    const char *name = mpad_cpu_isa();
    if (name)
        return PyUnicode_FromString(name);
    /* MOEPAD_CPU_ISA names none that this machine has; asking for it again says so. */
    mpad_status status;
    mpad_cpu_set_isa(NULL, &status);
    return raise_status(state_of(module), &status);
}

static PyObject *cpu_isas(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    const char *const *names = mpad_cpu_isa_available();
    Py_ssize_t n = 0;
    while (names[n])
        n++;
    PyObject *tuple = PyTuple_New(n);
    for (Py_ssize_t i = 0; tuple && i < n; i++) {
        PyObject *name = PyUnicode_FromString(names[i]);
        if (!name || PyTuple_SetItem(tuple, i, name) != 0)
            Py_CLEAR(tuple);
    }
    return tuple;
}

static PyObject *read_bandwidth(PyObject *module, PyObject *const *args, Py_ssize_t n_arg,
                                PyObject *kwnames)
{
    module_state *state = state_of(module);
    mpad_status status;
    PyObject *value;
    mpad_view view;
    mpad_leases leases = {.n = 0};
    double rate = 0;
    mpad_code code = take_arguments(state, F_READ_BANDWIDTH, args, n_arg, kwnames, &value, &status);
    if (code == MPAD_OK)
        code = mpad_tensor_acquire(&state->tensors, value, "array", false, &view, &leases, &status);
    if (code == MPAD_OK && view.device.vendor != MPAD_HOST)
        code = mpad_fail(&status, MPAD_VALUE, "array: expected memory of the CPU");
    if (code == MPAD_OK && (view.n_dim > MPAD_VIEW_MAX_DIM || !mpad_view_is_contiguous(&view) ||
                            mpad_view_count(&view) == 0))
        code = mpad_fail(&status, MPAD_VALUE,
                         "array: expected a contiguous array of at most %d dimensions that is not "
                         "empty",
                         MPAD_VIEW_MAX_DIM);
    if (code == MPAD_OK) {
        Py_BEGIN_ALLOW_THREADS rate =
            mpad_cpu_read_bandwidth(view.data, mpad_view_count(&view) * view.n_item_bytes);
        Py_END_ALLOW_THREADS
    }
    mpad_leases_end(&leases);
    return code == MPAD_OK ? PyFloat_FromDouble(rate) : raise_status(state, &status);
}

static PyObject *peak_flops(PyObject *module, PyObject *const *args, Py_ssize_t n_arg,
                            PyObject *kwnames)
{
    static const char *const choices[] = {"f32", "bf16", "f16"};
    static const mpad_dtype dtypes[] = {MPAD_DTYPE_F32, MPAD_DTYPE_BF16, MPAD_DTYPE_F16};
    module_state *state = state_of(module);
    mpad_status status;
    PyObject *values[2];
    int choice = 0;
    double seconds = 0, rate;
    mpad_code code = take_arguments(state, F_PEAK_FLOPS, args, n_arg, kwnames, values, &status);
    if (code == MPAD_OK)
        code = take_choice("dtype", values[0], choices, COUNT(choices), &choice, &status);
    if (code == MPAD_OK)
        code = take_number("seconds", values[1], &seconds, &status);
    if (code == MPAD_OK && !(seconds > 0 && seconds <= 60))
        code = mpad_fail(&status, MPAD_VALUE, "seconds: expected more than 0, at most 60, got %g",
                         seconds);
    if (code != MPAD_OK)
        return raise_status(state, &status);
    Py_BEGIN_ALLOW_THREADS rate = mpad_cpu_peak_flops(dtypes[choice], seconds);
    Py_END_ALLOW_THREADS return PyFloat_FromDouble(rate);
}

static PyObject *gpu_report(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return mpad_device_report();
}

/* Memory of GPUs, for moepad.devices; positional arguments only. */

static mpad_code find_gpu(int device_type, int index, mpad_device *device, mpad_gpu **gpu,
                          mpad_status *status)
{
    MPAD_TRY(mpad_memory_take_device(device_type, index, device, status));
    return mpad_device_find(*device, gpu, status);
}

static PyObject *gpu_memory(PyObject *module, PyObject *args)
{
    mpad_status status;
    mpad_device device;
    mpad_gpu *gpu;
    int device_type, index;
    long long n_bytes;
    if (!PyArg_ParseTuple(args, "iiL", &device_type, &index, &n_bytes))
        return NULL;
    PyObject *memory = NULL;
    if (find_gpu(device_type, index, &device, &gpu, &status) == MPAD_OK)
        memory = mpad_memory_new(gpu, device, n_bytes, &status);
    return memory ? memory : raise_status(state_of(module), &status);
}

/* Numbers of a tuple; -1 with an exception, or how many. */
static int take_numbers(PyObject *tuple, int64_t *numbers)
{
    int n = (int)PyTuple_Size(tuple);
    if (n > MPAD_VIEW_MAX_DIM) {
        PyErr_Format(PyExc_ValueError, "expected at most %d dimensions", MPAD_VIEW_MAX_DIM);
        return -1;
    }
    for (int i = 0; i < n; i++) {
        numbers[i] = PyLong_AsLongLong(PyTuple_GetItem(tuple, i));
        if (PyErr_Occurred())
            return -1;
    }
    return n;
}

static mpad_code take_dtype_name(const char *name, mpad_view *view, mpad_status *status)
{
    for (view->dtype = 0; view->dtype < MPAD_DTYPE_COUNT; view->dtype++)
        if (strcmp(name, mpad_dtype_name(view->dtype)) == 0)
            return MPAD_OK;
    return mpad_fail(status, MPAD_VALUE, "dtype: unknown name %s", name);
}

static PyObject *gpu_export(PyObject *module, PyObject *args)
{
    mpad_status status;
    mpad_view view = {.n_item_bytes = 0};
    PyObject *memory, *shape, *strides;
    const char *dtype;
    long long offset, n_item_bytes;
    int is_versioned;
    if (!PyArg_ParseTuple(args, "OLsLO!O!p", &memory, &offset, &dtype, &n_item_bytes, &PyTuple_Type,
                          &shape, &PyTuple_Type, &strides, &is_versioned))
        return NULL;
    view.data = (char *)(intptr_t)offset;
    view.n_item_bytes = n_item_bytes;
    view.n_dim = take_numbers(shape, view.size);
    if (view.n_dim < 0 || take_numbers(strides, view.stride) != view.n_dim)
        return NULL;
    PyObject *capsule = NULL;
    if (take_dtype_name(dtype, &view, &status) == MPAD_OK)
        capsule = mpad_memory_export(memory, &view, is_versioned, &status);
    return capsule ? capsule : raise_status(state_of(module), &status);
}

/* The GPU that two integers name; NULL with an exception set. */
static mpad_gpu *take_gpu(PyObject *module, PyObject *args)
{
    mpad_status status;
    mpad_device device;
    mpad_gpu *gpu;
    int device_type, index;
    if (!PyArg_ParseTuple(args, "ii", &device_type, &index))
        return NULL;
    if (find_gpu(device_type, index, &device, &gpu, &status) == MPAD_OK)
        return gpu;
    raise_status(state_of(module), &status);
    return NULL;
}

static PyObject *gpu_staging(PyObject *module, PyObject *args)
{
    mpad_status status;
    mpad_gpu *gpu = take_gpu(module, args);
    if (!gpu)
        return NULL;
    PyObject *staging = mpad_memory_staging_new(gpu, &status);
    return staging ? staging : raise_status(state_of(module), &status);
}

static PyObject *gpu_settle(PyObject *module, PyObject *args)
{
    mpad_status status;
    mpad_code code;
    mpad_gpu *gpu = take_gpu(module, args);
    if (!gpu)
        return NULL;
    Py_BEGIN_ALLOW_THREADS code = mpad_gpu_settle(gpu, &status);
    Py_END_ALLOW_THREADS if (code != MPAD_OK) return raise_status(state_of(module), &status);
    Py_RETURN_NONE;
}

static mpad_code put_views(mpad_staging *staging, const mpad_view *dst, const mpad_view *src,
                           mpad_status *status)
{
    mpad_code code;
    Py_BEGIN_ALLOW_THREADS code = mpad_staging_put(staging, dst, src, status);
    Py_END_ALLOW_THREADS return code;
}

static PyObject *gpu_put(PyObject *module, PyObject *args)
{
    module_state *state = state_of(module);
    mpad_status status;
    mpad_view dst, src;
    mpad_leases leases = {.n = 0};
    PyObject *capsule, *to, *from;
    if (!PyArg_ParseTuple(args, "OOO", &capsule, &to, &from))
        return NULL;
    mpad_staging *staging = mpad_memory_staging(capsule);
    if (!staging)
        return NULL;
    mpad_code code = mpad_tensor_acquire(&state->tensors, to, "dst", true, &dst, &leases, &status);
    if (code == MPAD_OK)
        code = mpad_tensor_acquire(&state->tensors, from, "src", false, &src, &leases, &status);
    if (code == MPAD_OK)
        code = put_views(staging, &dst, &src, &status);
    mpad_leases_end(&leases);
    if (code != MPAD_OK)
        return raise_status(state, &status);
    Py_RETURN_NONE;
}

static PyObject *gpu_wait(PyObject *module, PyObject *capsule)
{
    mpad_status status;
    mpad_code code;
    mpad_staging *staging = mpad_memory_staging(capsule);
    if (!staging)
        return NULL;
    Py_BEGIN_ALLOW_THREADS code = mpad_staging_wait(staging, &status);
    Py_END_ALLOW_THREADS if (code != MPAD_OK) return raise_status(state_of(module), &status);
    Py_RETURN_NONE;
}

/* The module. */

#define METHOD(name)                                                                               \
    {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL | METH_KEYWORDS, name##_doc}
#define METHOD_PLAIN(name) {#name, name, METH_NOARGS, name##_doc}

static PyMethodDef methods[] = {
    METHOD(get_moe_padding_size),
    METHOD(get_moe_weight_sizes),
    METHOD(plan),
    METHOD(fused_moe),
    METHOD(workspace_nbytes),
    METHOD(time_fused_moe),
    METHOD(copy),
    METHOD(set_num_threads),
    METHOD_PLAIN(get_num_threads),
    METHOD(set_cpu_isa),
    METHOD_PLAIN(cpu_isa),
    METHOD_PLAIN(cpu_isas),
    METHOD(read_bandwidth),
    METHOD(peak_flops),
    METHOD_PLAIN(gpu_report),
    {"gpu_memory", gpu_memory, METH_VARARGS, gpu_memory_doc},
    {"gpu_export", gpu_export, METH_VARARGS, gpu_export_doc},
    {"gpu_settle", gpu_settle, METH_VARARGS, gpu_settle_doc},
    {"gpu_staging", gpu_staging, METH_VARARGS, gpu_staging_doc},
    {"gpu_put", gpu_put, METH_VARARGS, gpu_put_doc},
    {"gpu_wait", gpu_wait, METH_O, gpu_wait_doc},
    {NULL, NULL, 0, NULL},
};

static PyObject *add_exception(PyObject *module, const char *name, const char *doc, PyObject *base)
{
    char path[64];
    snprintf(path, sizeof path, "moepad.%s", name);
    PyObject *exception = PyErr_NewExceptionWithDoc(path, doc, base, NULL);
    if (exception && PyModule_AddObjectRef(module, name, exception) != 0)
        Py_CLEAR(exception);
    return exception;
}

static PyObject *exception_of(PyObject *borrowed)
{
    Py_INCREF(borrowed);
    return borrowed;
}

static int add_exceptions(PyObject *module, module_state *state)
{
    state->exceptions[MPAD_TYPE] = exception_of(PyExc_TypeError);
    state->exceptions[MPAD_VALUE] = exception_of(PyExc_ValueError);
    state->exceptions[MPAD_MEMORY] = exception_of(PyExc_MemoryError);
    state->exceptions[MPAD_UNSUPPORTED] =
        add_exception(module, "UnsupportedError",
                      "No kernel carries the call out; the message lists each path considered.",
                      PyExc_NotImplementedError);
    state->exceptions[MPAD_DEVICE] =
        add_exception(module, "DeviceError", "A device's runtime library reported a failure.",
                      PyExc_RuntimeError);
    state->checkpoint_error =
        add_exception(module, "CheckpointError",
                      "A checkpoint lacks a tensor, or has one twice, or of a wrong shape or type.",
                      PyExc_ValueError);
    return state->exceptions[MPAD_UNSUPPORTED] && state->exceptions[MPAD_DEVICE] &&
                   state->checkpoint_error
               ? 0
               : -1;
}

static int intern_names(module_state *state)
{
    for (int f = 0; f < F_COUNT; f++)
        for (int i = 0; i < SIGNATURES[f].n_parameter; i++)
            if (!(state->parameter[f][i] = PyUnicode_InternFromString(SIGNATURES[f].parameter[i])))
                return -1;
    for (int i = 0; i < COUNT(ACTS); i++)
        if (!(state->act[i] = PyUnicode_InternFromString(ACTS[i])))
            return -1;
    return 0;
}

static int module_exec(PyObject *module)
{
    module_state *state = state_of(module);
    if (mpad_tensor_init(&state->tensors) != 0 || add_exceptions(module, state) != 0)
        return -1;
    return intern_names(state);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    module_state *state = state_of(module);
    for (int i = 0; i < COUNT(state->exceptions); i++)
        Py_VISIT(state->exceptions[i]);
    Py_VISIT(state->checkpoint_error);
    return mpad_tensor_traverse(&state->tensors, visit, arg);
}

static int module_clear(PyObject *module)
{
    module_state *state = state_of(module);
    mpad_tensor_clear(&state->tensors);
    for (int i = 0; i < COUNT(state->exceptions); i++)
        Py_CLEAR(state->exceptions[i]);
    Py_CLEAR(state->checkpoint_error);
    for (int f = 0; f < F_COUNT; f++)
        for (int i = 0; i < P_COUNT; i++)
            Py_CLEAR(state->parameter[f][i]);
    for (int i = 0; i < COUNT(ACTS); i++)
        Py_CLEAR(state->act[i]);
    return 0;
}

static void module_free(void *module)
{
    module_clear(module);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED}, /* nor is NumPy */
#endif
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

PyDoc_STRVAR(module_doc, "The C core of moepad; use it through the package.");

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,          .m_name = "moepad._core", .m_doc = module_doc,
    .m_size = sizeof(module_state), .m_methods = methods,     .m_slots = slots,
    .m_traverse = module_traverse,  .m_clear = module_clear,  .m_free = module_free,
};

PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&definition);
}
