"""A viewer for the tests, on asyncvnc: viewer.py SOCKET COMMAND...

type=TEXT, key=NAME[+NAME...], wait=SECONDS, move=X,Y, click, and save=FILE, which writes the screen as binary PPM.
"""

import asyncio
import sys

import asyncvnc


async def save(client, path):
    # A screen that has grown since the last picture is all new.
    pixels = await asyncio.wait_for(client.screenshot(), 60)
    height, width, _ = pixels.shape
    with open(path, "wb") as file:
        file.write(b"P6 %d %d 255\n" % (width, height))
        file.write(pixels[:, :, :3].tobytes())


async def main(socket, commands):
    reader, writer = await asyncio.open_unix_connection(socket)
    client = await asyncvnc.Client.create(reader, writer)
    for command in commands:
        name, _, argument = command.partition("=")
        if name == "type":
            client.keyboard.write(argument)
        elif name == "key":
            client.keyboard.press(*argument.split("+"))
        elif name == "wait":
            await asyncio.sleep(float(argument))
        elif name == "move":
            client.mouse.move(*map(int, argument.split(",")))
        elif name == "click":
            client.mouse.click()
        elif name == "save":
            await save(client, argument)
        await client.drain()


asyncio.run(main(sys.argv[1], sys.argv[2:]))
