/* SPDX-License-Identifier: GPL-2.0-only */
/* The prompt, and the commands that are too small for a file of their own. */
#include "abi.h"
#include "virtio.h"

#define LINE_SIZE 512
#define CTRL_C 3
#define BACKSPACE 8
#define DELETE 127

bool commands_from_arguments = true;

static bool cmd_help(int argc, char **argv);

bool word_number64(int argc, char **argv, int index, u64 *value)
{
	return index < argc && parse_number(argv[index], value);
}

bool word_number(int argc, char **argv, int index, u32 *value)
{
	u64 wide;

	if (!word_number64(argc, argv, index, &wide) || wide > 0xffffffff)
		return false;
	*value = wide;
	return true;
}

void join_words(char *to, size_t size, int first, int argc, char **argv)
{
	size_t length = 0;

	to[0] = 0;
	for (int i = first; i < argc && length < size; i++)
		length += format(to + length, size - length, i > first ? " %s" : "%s", argv[i]);
}

static bool cmd_echo(int argc, char **argv)
{
	char text[LINE_SIZE];

	join_words(text, sizeof(text), 1, argc, argv);
	print("%s\n", text);
	return true;
}

static bool cmd_mem(int argc, char **argv)
{
	(void)argv;
	print("mem: %u bytes, kernel %x to %x, %u pages free, initrd %u bytes, guest limit %x\n", memory_size,
	      (u32)kernel_start, (u32)kernel_end, pages_free(), initrd_size, guest_limit);
	return argc == 1;
}

static bool cmd_uptime(int argc, char **argv)
{
	u32 rest;
	u64 seconds = div_u64(now_ns(), NSEC_PER_SEC, &rest);

	(void)argv;
	print("uptime: %llu.%03u s, timer interrupts %u, tsc %u kHz%s\n", seconds, rest / NSEC_PER_MSEC, irq_count[0],
	      tsc_khz(), *lguest_field(abi->tsc_khz) ? "" : " as measured");
	return argc == 1;
}

static bool cmd_args(int argc, char **argv)
{
	(void)argv;
	print("args: %s\n", kernel_arguments);
	return argc == 1;
}

static bool cmd_idle(int argc, char **argv)
{
	u32 seconds, ticks = 0;
	u64 end;

	if (!word_number(argc, argv, 1, &seconds))
		return false;
	end = now_ns() + (u64)seconds * NSEC_PER_SEC;
	while (now_ns() < end) {
		u32 flags = irq_save(), count = irq_count[0];

		set_clockevent(min(end - now_ns() + 1, (u64)NSEC_PER_SEC));
		while (irq_count[0] == count)
			halt();
		irq_restore(flags);
		ticks++;
	}
	print("idle: %u seconds, %u timer interrupts\n", seconds, ticks);
	return true;
}

static bool cmd_spin(int argc, char **argv)
{
	u32 seconds, loops = 0;
	u64 end;

	if (!word_number(argc, argv, 1, &seconds))
		return false;
	end = now_ns() + (u64)seconds * NSEC_PER_SEC;
	for (; now_ns() < end; loops++)
		for (volatile u32 i = 0; i < 1000; i++)
			;
	print("spin: %u seconds, %u thousand loops\n", seconds, loops);
	return true;
}

static bool cmd_poll(int argc, char **argv)
{
	if (argc != 2 || (strcmp(argv[1], "on") && strcmp(argv[1], "off")))
		return false;
	setting_poll = !strcmp(argv[1], "on");
	print("poll: %s, for devices set up from now on\n", argv[1]);
	return true;
}

static bool cmd_reboot(int argc, char **argv)
{
	(void)argv;
	if (argc == 1)
		shutdown("Restarting system", LGUEST_SHUTDOWN_RESTART);
	return false;
}

static bool cmd_poweroff(int argc, char **argv)
{
	(void)argv;
	if (argc == 1)
		shutdown("Power down", LGUEST_SHUTDOWN_POWEROFF);
	return false;
}

static bool cmd_crash(int argc, char **argv)
{
	char text[LINE_SIZE];

	join_words(text, sizeof(text), 1, argc, argv);
	shutdown(text, LGUEST_SHUTDOWN_POWEROFF);
}

static const struct command {
	const char *name, *arguments, *help;
	bool (*run)(int argc, char **argv);
} commands[] = {
	{ "help", "", "lists the commands", cmd_help },
	{ "echo", "TEXT", "prints TEXT", cmd_echo },
	{ "devices", "", "lists what is on the lguest bus", cmd_devices },
	{ "status", "DEVICE [wait]", "a device's status byte, as block0 or a virtio type; wait for it to need a reset",
	  cmd_status },
	{ "reset", "DEVICE", "resets a device; its driver starts it again when it is next used", cmd_reset },
	{ "mem", "", "how much memory there is", cmd_mem },
	{ "uptime", "", "how long the guest has run", cmd_uptime },
	{ "args", "", "prints the kernel arguments", cmd_args },
	{ "selfcheck", "[disk]", "checks the CPU, the host and the devices; with disk, overwrites disk 0", cmd_selfcheck },
	{ "blk",
	  "[-d N] read S N|write S N SEED|verify S N SEED|fill S N BYTE|barrier S N SEED|segs S N|flush|id|scsi|crc|"
	  "stress N SEED|reset-under-load N",
	  "disk requests; S is the first sector", cmd_blk },
	{ "console", "lines N LEN|read N|cat|reset", "console tests", cmd_console },
	{ "net", "[-d N] ip ADDRESS [for SECONDS]|addr ADDRESS|ping ADDRESS N [BYTES]", "answers ARP and ping, or pings", cmd_net },
	{ "rng", "read N", "reads N random bytes", cmd_rng },
	{ "ask", "[-d N] TYPE TEXT", "sends TEXT to a device of that virtio type, and prints what comes back", cmd_ask },
	{ "torture", "N [ADDRESS]", "N rounds of work for disk 0 and all else at once, pinging ADDRESS; ^C ends it",
	  cmd_torture },
	{ "idle", "SECONDS", "halts, with a timer every second", cmd_idle },
	{ "spin", "SECONDS", "keeps the CPU busy", cmd_spin },
	{ "bench", "hcall N|syscall N|fault N|blk N", "nanoseconds each", cmd_bench },
	{ "poll", "on|off", "whether drivers poll instead of taking interrupts", cmd_poll },
	{ "misdeed", "NAME[@DEVICE]|list", "does something a guest must not do", cmd_misdeed },
	{ "reboot", "", "restarts the guest", cmd_reboot },
	{ "poweroff", "", "ends the guest", cmd_poweroff },
	{ "crash", "TEXT", "ends the guest with TEXT as the reason", cmd_crash },
};

static bool cmd_help(int argc, char **argv)
{
	(void)argc;
	(void)argv;
	for (unsigned int i = 0; i < ARRAY_SIZE(commands); i++)
		print("%s%s%s: %s\n", commands[i].name, *commands[i].arguments ? " " : "", commands[i].arguments,
		      commands[i].help);
	return true;
}

static void run_command(char *line)
{
	char *argv[MAX_WORDS];
	int argc = 0;

	while (argc < MAX_WORDS) {
		while (*line == ' ' || *line == '\t')
			line++;
		if (!*line)
			break;
		argv[argc++] = line;
		while (*line && *line != ' ' && *line != '\t')
			line++;
		if (*line)
			*line++ = 0;
	}
	if (!argc)
		return;
	for (unsigned int i = 0; i < ARRAY_SIZE(commands); i++) {
		if (strcmp(argv[0], commands[i].name))
			continue;
		if (!commands[i].run(argc, argv))
			print("usage: %s %s\n", commands[i].name, commands[i].arguments);
		return;
	}
	print("%s: no such command, try help\n", argv[0]);
}

void shell_run(char *line)
{
	while (line) {
		char *next = strchr(line, ';');

		if (next)
			*next++ = 0;
		run_command(line);
		line = next;
	}
}

/* Enough for a human: backspace, and ^C for another line. False if there is no console. */
static bool read_line(char *line)
{
	size_t length = 0;

	print("test> ");
	for (;;) {
		int c = console_getc();

		if (c < 0)
			return false;
		if (c == '\r' || c == '\n') {
			print("\n");
			line[length] = 0;
			return true;
		}
		if (c == CTRL_C) {
			print("^C\ntest> ");
			length = 0;
		} else if (c == BACKSPACE || c == DELETE) {
			if (length) {
				print("\b \b");
				length--;
			}
		} else if (c >= ' ' && length < LINE_SIZE - 1) {
			line[length++] = c;
			print("%c", c);
		}
	}
}

void shell_prompt(void)
{
	static char line[LINE_SIZE];

	commands_from_arguments = false;
	while (read_line(line))
		shell_run(line);
	print("no console to read from: halted\n");
	for (;;)
		halt();
}
