/* Level 1: see status.h. */
#include "status.h"

#include <stdarg.h>
#include <stdio.h>

mpad_code mpad_fail(mpad_status *status, mpad_code code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(status->message, sizeof(status->message), format, arguments);
    va_end(arguments);
    status->code = code;
    return code;
}
