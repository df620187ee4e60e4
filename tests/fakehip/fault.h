/* Faults on purpose, for both stand-in libraries. */
#ifndef FAKEHIP_FAULT_H
#define FAKEHIP_FAULT_H

/* Counts a call of `function`; returns the error to inject, `usual` if the plan names none, or 0.
 */
int fault_count(const char *function, int usual);

#endif
