/* Faults on purpose. FAKEHIP_FAIL in the environment is the first plan. */
#define _GNU_SOURCE
#include "fault.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))

enum { N_FUNCTION_MAX = 256 };
static struct {
    const char *name;
    long n;
} calls[N_FUNCTION_MAX];
static int n_function;
static long n_call;
static char plan[256];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void read_environment(void)
{
    const char *text = getenv("FAKEHIP_FAIL");
    snprintf(plan, sizeof plan, "%s", text ? text : "");
}

/* `text` is a list of FUNCTION:N[=ERROR]: the N-th call of that function from now on fails;
 * function
 * "*" counts all calls together, N = 0 means each. Empty: none fails. Counting starts anew. */
API void fakehip_fail(const char *text)
{
    pthread_once(&once, read_environment);
    pthread_mutex_lock(&lock);
    snprintf(plan, sizeof plan, "%s", text);
    n_function = 0;
    n_call = 0;
    pthread_mutex_unlock(&lock);
}

/* How often `function` ("*": any) was called since the plan was set. */
API long fakehip_calls(const char *function)
{
    pthread_mutex_lock(&lock);
    long n = strcmp(function, "*") ? 0 : n_call;
    for (int i = 0; i < n_function; i++)
        if (!strcmp(calls[i].name, function))
            n = calls[i].n;
    pthread_mutex_unlock(&lock);
    return n;
}

int fault_count(const char *function, int usual)
{
    pthread_once(&once, read_environment);
    pthread_mutex_lock(&lock);
    int i = 0, fault = 0;
    while (i < n_function && strcmp(calls[i].name, function))
        i++;
    if (i == n_function && n_function < N_FUNCTION_MAX - 1) {
        calls[n_function].name = function;
        calls[n_function++].n = 0;
    }
    n_call++;
    long n = ++calls[i].n;
    for (const char *item = plan; item && *item; item = strchr(item, ',')) {
        item += *item == ',';
        size_t length = strcspn(item, ":");
        int is_any = length == 1 && *item == '*';
        int is_this = strlen(function) == length && !strncmp(item, function, length);
        if (item[length] != ':' || !(is_any || is_this))
            continue;
        char *end;
        long at = strtol(item + length + 1, &end, 10);
        if (at == 0 || at == (is_any ? n_call : n))
            fault = *end == '=' ? atoi(end + 1) : usual;
    }
    pthread_mutex_unlock(&lock);
    return fault;
}
