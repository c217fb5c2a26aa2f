// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause
/*
 * What a PC board would have told the kernel, had it our devices: the guest tests need something to sit on two of
 * the virtio buses, and nothing on x86 puts it there.
 *
 * - SPI: a user-space device on each of the first four chip selects of controller 0. "dh2228fv" is an id that the
 *   spidev driver accepts.
 * - SCMI: a device tree with a /firmware/scmi node; the tree of a PC is empty otherwise.
 */
#include <linux/init.h>
#include <linux/of.h>
#include <linux/of_platform.h>
#include <linux/printk.h>
#include <linux/spi/spi.h>

#define LAB_CHIP_SELECTS 4

extern const u8 __dtbo_scmi_begin[];
extern const u8 __dtbo_scmi_end[];

static int __init lab_spi_devices(void)
{
	struct spi_board_info info = {
		.modalias = "dh2228fv",
		.max_speed_hz = 10000000,
		.bus_num = 0,
	};
	int err = 0;

	for (info.chip_select = 0; !err && info.chip_select < LAB_CHIP_SELECTS; info.chip_select++)
		err = spi_register_board_info(&info, 1);
	return err;
}
arch_initcall(lab_spi_devices);

static int __init lab_scmi_node(void)
{
	struct device_node *firmware;
	int changeset;
	int err;

	err = of_overlay_fdt_apply(__dtbo_scmi_begin, __dtbo_scmi_end - __dtbo_scmi_begin, &changeset, NULL);
	if (err) {
		pr_err("lab: no SCMI node: %d\n", err);
		return err;
	}
	firmware = of_find_node_by_path("/firmware");
	if (!firmware)
		return -ENODEV;
	err = of_platform_populate(firmware, NULL, NULL, NULL);
	of_node_put(firmware);
	return err;
}
device_initcall(lab_scmi_node);
