"""Commands: `python -m reid_repro export …` and `python -m reid_repro convert …`."""

import argparse


def _export(given: argparse.Namespace) -> str:
    from reid_repro.lab.export import export_network
    from reid_repro.lab.methods import from_checkpoint

    method = from_checkpoint(given.name, given.folder or None, device="cpu")
    path = export_network(method, given.to, given.format)
    return f"{path}\n{path.with_suffix('.json')}"


def _convert(given: argparse.Namespace) -> str:
    from reid_repro.learning.conversion import convert_weights

    architecture = convert_weights(given.source, given.target, given.strip)
    return f"{given.target}: {architecture}; give it as weights="


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="reid_repro", description=__doc__)
    commands = parser.add_subparsers(required=True)
    export = commands.add_parser("export", help="a trained network as a file for other programs")
    export.add_argument("name", help="a .safetensors file, or a name of checkpoint_names()")
    export.add_argument("--folder", default="", help="where the name is looked up")
    export.add_argument("--to", default=".", help="folder to write to")
    export.add_argument("--format", default="onnx", help="torchscript, export or onnx")
    export.set_defaults(run=_export)
    convert = commands.add_parser("convert", help="published weights (.pth) as safetensors")
    convert.add_argument("source", help=".pth, .pt, .pth.tar or .safetensors")
    convert.add_argument("target", help="a file that ends in .safetensors")
    convert.add_argument("--strip", default=None, help="prefix to take off (default: found)")
    convert.set_defaults(run=_convert)
    given = parser.parse_args(words)
    try:
        print(given.run(given))
    except (ValueError, OSError) as error:
        raise SystemExit(f"{error}") from None


if __name__ == "__main__":
    main()
