/* SPDX-License-Identifier: GPL-2.0-only */
#include "guest.h"
bool cmd_misdeed(int argc, char **argv){(void)argc;(void)argv;return false;}
