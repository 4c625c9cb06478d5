/* SPDX-License-Identifier: GPL-2.0-only */
/* From the entry point to the prompt, and the ways out. */
#include "abi.h"
#include "virtio.h"

/* struct boot_params, from asm/bootparam.h: offsets of what we read. */
#define BP_E820_ENTRIES 0x1e8
#define BP_RAMDISK_IMAGE 0x218
#define BP_RAMDISK_SIZE 0x21c
#define BP_CMD_LINE_PTR 0x228
#define BP_E820_MAP 0x2d0

u32 memory_size, memory_end, initrd_size;
char *kernel_arguments = "";
bool setting_poll, setting_noindirect, setting_noconsole;

static bool setting_quiet;
static const char *unknown_abi;

/* The early console: NOTIFY of a string's address. Linux sends at most 16 characters a call; so do we. */
void early_print(const char *text, size_t length)
{
	char scratch[17];

	while (length) {
		size_t n = min(length, sizeof(scratch) - 1);

		memcpy(scratch, text, n);
		scratch[n] = 0;
		hcall(LHCALL_NOTIFY, (u32)scratch, 0, 0, 0);
		text += n;
		length -= n;
	}
}

void shutdown(const char *message, u32 reason)
{
	static char text[128]; /* the host reads this many bytes whatever the string's length */

	console_drain();
	format(text, sizeof(text), "%s", message);
	hcall(LHCALL_SHUTDOWN, (u32)text, reason, 0, 0);
	for (;;)
		halt();
}

void panic_at(const char *file, int line, const char *fmt, ...)
{
	static char text[256];
	va_list args;
	size_t length;

	/* Whatever broke, the early console needs nothing but the host. */
	setting_noconsole = true;
	console_up = false;
	length = format(text, sizeof(text), "test guest panic: ");
	va_start(args, fmt);
	vformat(text + length, sizeof(text) - length, fmt, args);
	va_end(args);
	early_print("\n", 1);
	early_print(text, strlen(text));
	length = format(text + 200, 56, " (%s:%d)\n", file, line);
	early_print(text + 200, min(length, 55u));
	text[127] = 0;
	shutdown(text, LGUEST_SHUTDOWN_POWEROFF);
}

/* Settings are the words at the beginning that have a '=' or are known; the rest is commands. */
static char *parse_settings(char *text)
{
	for (;;) {
		char *end, saved;
		bool setting = true;

		while (*text == ' ')
			text++;
		for (end = text; *end && *end != ' ' && *end != ';'; end++)
			;
		saved = *end;
		*end = 0;
		if (!strcmp(text, "quiet"))
			setting_quiet = true;
		else if (!strcmp(text, "noconsole"))
			setting_noconsole = true;
		else if (!strcmp(text, "poll"))
			setting_poll = true;
		else if (!strcmp(text, "noindirect"))
			setting_noindirect = true;
		else if (!strncmp(text, "abi=", 4)) {
			if (!abi_select(text + 4))
				unknown_abi = text;
		} else
			setting = strchr(text, '=') != NULL; /* a word for some other kernel */
		if (!setting || text == end) {
			*end = saved;
			return text;
		}
		text = end;
		if (saved)
			text++;
	}
}

noreturn void guest_main(u8 *boot_params);

void guest_main(u8 *boot_params)
{
	static char arguments[4096];
	char *commands;
	u32 cmd_line, ramdisk;

	memory_size = *(u32 *)(boot_params + BP_E820_MAP + 8);
	ramdisk = *(u32 *)(boot_params + BP_RAMDISK_IMAGE);
	initrd_size = *(u32 *)(boot_params + BP_RAMDISK_SIZE);
	memory_end = initrd_size && ramdisk < memory_size ? ramdisk : memory_size;
	cmd_line = *(u32 *)(boot_params + BP_CMD_LINE_PTR);
	if (cmd_line)
		format(arguments, sizeof(arguments), "%s", (char *)cmd_line);
	commands = parse_settings(arguments);
	if (cmd_line)
		kernel_arguments = (char *)cmd_line;

	abi_init();
	/* From here on the early console works. */
	if (unknown_abi)
		panic("unknown %s", unknown_abi);
	if (boot_params[BP_E820_ENTRIES] != 1 || !memory_size)
		panic("%u e820 entries, %u bytes of memory", boot_params[BP_E820_ENTRIES], memory_size);
	paging_init();
	traps_init();
	interrupts_init();
	bus_init();
	if (!setting_noconsole)
		console_init();
	if (!setting_quiet)
		print("lgmp test guest, lguest ABI %s, %u KiB of memory, %u devices\n", abi->name, memory_size / 1024,
		      device_count);
	shell_run(commands);
	shell_prompt();
}
