/* The stand-in libhiprtc: the hipRTC functions on top of a clang that has the AMDGPU target.
 * FAKEHIP_CLANG names another one. Only extern "C" names can be looked up. */
#define _GNU_SOURCE
#include "fault.h"

#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))

typedef enum hiprtcResult {
    HIPRTC_SUCCESS = 0,
    HIPRTC_ERROR_OUT_OF_MEMORY = 1,
    HIPRTC_ERROR_INVALID_INPUT = 3,
    HIPRTC_ERROR_INVALID_PROGRAM = 4,
    HIPRTC_ERROR_INVALID_OPTION = 5,
    HIPRTC_ERROR_COMPILATION = 6,
    HIPRTC_ERROR_INTERNAL_ERROR = 11
} hiprtcResult;

typedef struct File {
    char *name, *text;
} File;

typedef struct Program {
    File *files; /* the source, then the headers */
    int n_file;
    char *log, *code;
    size_t n_code;
} Program;

enum { PATH_SIZE = 512, N_ARGUMENT_MAX = 256 };
extern char **environ;

#define ENTER()                                                                                    \
    do {                                                                                           \
        int fault_ = fault_count(__func__, HIPRTC_ERROR_INTERNAL_ERROR);                           \
        if (fault_)                                                                                \
            return (hiprtcResult)fault_;                                                           \
    } while (0)

static char *read_file(const char *path, size_t *n)
{
    FILE *file = fopen(path, "rb");
    if (!file)
        return NULL;
    fseek(file, 0, SEEK_END);
    size_t size = (size_t)ftell(file);
    rewind(file);
    char *text = calloc(size + 1, 1);
    *n = fread(text, 1, size, file);
    fclose(file);
    return text;
}

API hiprtcResult hiprtcVersion(int *major, int *minor)
{
    ENTER();
    if (!major || !minor)
        return HIPRTC_ERROR_INVALID_INPUT;
    *major = 7;
    *minor = 0;
    return HIPRTC_SUCCESS;
}

API const char *hiprtcGetErrorString(hiprtcResult result)
{
    switch (result) {
    case HIPRTC_SUCCESS:
        return "HIPRTC_SUCCESS";
    case HIPRTC_ERROR_OUT_OF_MEMORY:
        return "HIPRTC_ERROR_OUT_OF_MEMORY";
    case HIPRTC_ERROR_INVALID_INPUT:
        return "HIPRTC_ERROR_INVALID_INPUT";
    case HIPRTC_ERROR_INVALID_PROGRAM:
        return "HIPRTC_ERROR_INVALID_PROGRAM";
    case HIPRTC_ERROR_INVALID_OPTION:
        return "HIPRTC_ERROR_INVALID_OPTION";
    case HIPRTC_ERROR_COMPILATION:
        return "HIPRTC_ERROR_COMPILATION";
    case HIPRTC_ERROR_INTERNAL_ERROR:
        return "HIPRTC_ERROR_INTERNAL_ERROR";
    }
    return "Invalid HIPRTC error code";
}

API hiprtcResult hiprtcCreateProgram(void **handle, const char *source, const char *name,
                                     int n_header, const char **texts, const char **names)
{
    ENTER();
    if (!handle || !source || n_header < 0 || (n_header && (!texts || !names)))
        return HIPRTC_ERROR_INVALID_INPUT;
    (void)name;
    Program *program = calloc(1, sizeof *program);
    program->n_file = 1 + n_header;
    program->files = calloc((size_t)program->n_file, sizeof(File));
    program->files[0] = (File){strdup("program.hip"), strdup(source)};
    for (int i = 0; i < n_header; i++)
        program->files[1 + i] = (File){strdup(names[i]), strdup(texts[i])};
    program->log = strdup("");
    *handle = program;
    return HIPRTC_SUCCESS;
}

API hiprtcResult hiprtcDestroyProgram(void **handle)
{
    ENTER();
    if (!handle || !*handle)
        return HIPRTC_ERROR_INVALID_PROGRAM;
    Program *program = *handle;
    for (int i = 0; i < program->n_file; i++) {
        free(program->files[i].name);
        free(program->files[i].text);
    }
    free(program->files);
    free(program->log);
    free(program->code);
    free(program);
    *handle = NULL;
    return HIPRTC_SUCCESS;
}

/* Runs the command with its output in `log`; 0 when it succeeds, -1 when there is no such command.
 */
static int run(char **arguments, const char *log)
{
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 1, log, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    posix_spawn_file_actions_adddup2(&actions, 1, 2);
    pid_t child;
    int status = 0, failed = posix_spawnp(&child, arguments[0], &actions, NULL, arguments, environ);
    posix_spawn_file_actions_destroy(&actions);
    if (failed)
        return -1;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    return !WIFEXITED(status) || WEXITSTATUS(status);
}

static hiprtcResult compile(Program *program, const char *folder, int n_option,
                            const char **options)
{
    char path[PATH_SIZE], log[PATH_SIZE], code[PATH_SIZE], include[PATH_SIZE];
    for (int i = 0; i < program->n_file; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, program->files[i].name);
        FILE *file = fopen(path, "wb");
        if (!file)
            return HIPRTC_ERROR_INVALID_INPUT;
        fputs(program->files[i].text, file);
        fclose(file);
    }
    snprintf(path, sizeof path, "%s/%s", folder, program->files[0].name);
    snprintf(log, sizeof log, "%s/log", folder);
    snprintf(code, sizeof code, "%s/code", folder);
    snprintf(include, sizeof include, "-I%s", folder);
    char *arguments[N_ARGUMENT_MAX] = {NULL,
                                       "-x",
                                       "hip",
                                       "--offload-device-only",
                                       "-nogpuinc",
                                       "-nogpulib",
                                       "--no-gpu-bundle-output",
                                       "-fno-color-diagnostics",
                                       "-O3",
                                       "-D__HIPCC_RTC__=1",
                                       include,
                                       "-o",
                                       code,
                                       path};
    int n = 14;
    for (int i = 0; i < n_option && n < N_ARGUMENT_MAX - 1; i++) {
        const char *old = "--gpu-architecture=";
        bool is_arch = !strncmp(options[i], old, strlen(old));
        arguments[n++] = (char *)options[i];
        static _Thread_local char arch[128];
        if (is_arch) {
            snprintf(arch, sizeof arch, "--offload-arch=%s", options[i] + strlen(old));
            arguments[n - 1] = arch;
        }
    }
    const char *names[] = {getenv("FAKEHIP_CLANG"), "clang-22", "clang"};
    int status = -1;
    for (size_t i = 0; i < sizeof names / sizeof *names && status < 0; i++)
        if (names[i]) {
            arguments[0] = (char *)names[i];
            status = run(arguments, log);
        }
    free(program->log);
    free(program->code);
    program->code = NULL;
    program->log = NULL;
    if (status < 0) {
        program->log = strdup("no clang found (FAKEHIP_CLANG names one)");
        return HIPRTC_ERROR_INTERNAL_ERROR;
    }
    size_t n_log;
    program->log = read_file(log, &n_log);
    program->code = status ? NULL : read_file(code, &program->n_code);
    for (int i = 0; i < program->n_file; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, program->files[i].name);
        unlink(path);
    }
    unlink(log);
    unlink(code);
    return program->code ? HIPRTC_SUCCESS : HIPRTC_ERROR_COMPILATION;
}

API hiprtcResult hiprtcCompileProgram(void *handle, int n_option, const char **options)
{
    ENTER();
    if (!handle)
        return HIPRTC_ERROR_INVALID_PROGRAM;
    if (n_option < 0 || (n_option && !options))
        return HIPRTC_ERROR_INVALID_INPUT;
    char folder[] = "/tmp/hiprtcXXXXXX";
    if (!mkdtemp(folder))
        return HIPRTC_ERROR_INTERNAL_ERROR;
    hiprtcResult result = compile(handle, folder, n_option, options);
    rmdir(folder);
    return result;
}

API hiprtcResult hiprtcGetCodeSize(void *handle, size_t *n)
{
    ENTER();
    Program *program = handle;
    if (!program || !program->code)
        return HIPRTC_ERROR_INVALID_PROGRAM;
    if (!n)
        return HIPRTC_ERROR_INVALID_INPUT;
    *n = program->n_code;
    return HIPRTC_SUCCESS;
}

API hiprtcResult hiprtcGetCode(void *handle, char *code)
{
    ENTER();
    Program *program = handle;
    if (!program || !program->code)
        return HIPRTC_ERROR_INVALID_PROGRAM;
    if (!code)
        return HIPRTC_ERROR_INVALID_INPUT;
    memcpy(code, program->code, program->n_code);
    return HIPRTC_SUCCESS;
}

API hiprtcResult hiprtcGetProgramLogSize(void *handle, size_t *n)
{
    ENTER();
    if (!handle)
        return HIPRTC_ERROR_INVALID_PROGRAM;
    if (!n)
        return HIPRTC_ERROR_INVALID_INPUT;
    *n = strlen(((Program *)handle)->log) + 1;
    return HIPRTC_SUCCESS;
}

API hiprtcResult hiprtcGetProgramLog(void *handle, char *log)
{
    ENTER();
    if (!handle)
        return HIPRTC_ERROR_INVALID_PROGRAM;
    if (!log)
        return HIPRTC_ERROR_INVALID_INPUT;
    strcpy(log, ((Program *)handle)->log);
    return HIPRTC_SUCCESS;
}
