from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from gateway.config.loading import KEYS_WITHOUT_EFFECT, LAUNCHER_VARIABLES, load_settings, to_toml, to_yaml
from gateway.config.settings import SECRETS, ConfigError, Settings

SHIPPED = Path(__file__).parents[3] / "config.toml"

LEGACY_CONFIG = """\
# HTTP server configuration
server_host = "0.0.0.0"
server_port = 8057

# Triton Inference Server configuration
triton_endpoint = "http://localhost:8001"
inference_timeout_secs = 5

# File system paths
vocabulary_path = "../model-repo/vocab.txt"

# Server Performance Configuration
max_concurrent_streams = 10
max_concurrent_batches = 50
inference_queue_size = 100

# Audio Processing Configuration
audio_buffer_capacity = 1048576       # 1MB
max_batch_audio_length_secs = 30.0

# WebSocket Streaming Configuration
stream_timeout_secs = 30
keepalive_check_period_ms = 100

# Model Configuration
preprocessor_model_name = "preprocessor"
encoder_model_name = "encoder"
decoder_joint_model_name = "decoder_joint"
max_symbols_per_step = 30
max_total_tokens = 200
"""

LEGACY_TUNING = """\
audio_buffer_pool_size = 20
encoder_pool_size = 50
decoder_pool_size = 100
max_triton_connections = 10
connection_idle_timeout_secs = 300
audio_buffer_capacity = 2097152  # 2MB
websocket_buffer_size = 65536    # 64KB
"""

LEGACY_ENVIRONMENT = {
    "AMIRA_SERVER_HOST": "0.0.0.0",
    "AMIRA_SERVER_PORT": "8057",
    "AMIRA_TRITON_ENDPOINT": "http://triton-server:8001",
    "AMIRA_INFERENCE_TIMEOUT_SECS": "10",
    "AMIRA_VOCABULARY_PATH": "../model-repo/vocab.txt",
    "AMIRA_MAX_CONCURRENT_STREAMS": "50",
    "AMIRA_MAX_CONCURRENT_BATCHES": "200",
    "AMIRA_INFERENCE_QUEUE_SIZE": "100",
    "AMIRA_AUDIO_BUFFER_CAPACITY": "1048576",
    "AMIRA_MAX_BATCH_AUDIO_LENGTH_SECS": "30.0",
    "AMIRA_STREAM_TIMEOUT_SECS": "30",
    "AMIRA_KEEPALIVE_CHECK_PERIOD_MS": "100",
    "AMIRA_PREPROCESSOR_MODEL_NAME": "preprocessor",
    "AMIRA_ENCODER_MODEL_NAME": "encoder",
    "AMIRA_DECODER_JOINT_MODEL_NAME": "decoder_joint",
    "AMIRA_MAX_SYMBOLS_PER_STEP": "30",
    "AMIRA_MAX_TOTAL_TOKENS": "200",
    "AMIRA_ENABLE_CPU_AFFINITY": "true",
    "AMIRA_INFERENCE_THREADS": "4",
    "AMIRA_IO_THREADS": "2",
    "AMIRA_NETWORK_THREADS": "2",
    "AMIRA_AUDIO_BUFFER_POOL_SIZE": "20",
    "AMIRA_ENCODER_POOL_SIZE": "50",
    "AMIRA_DECODER_POOL_SIZE": "100",
    "AMIRA_ENABLE_NUMA": "true",
    "AMIRA_ENABLE_CORS": "false",
    "AMIRA_MAX_REQUEST_SIZE": "10485760",
    "AMIRA_JAEGER_ENDPOINT": "http://localhost:14268/api/traces",
    "AMIRA_SERVICE_NAME": "amira-asr-server",
    "SERVER_HOST": "0.0.0.0",
    "SERVER_PORT": "8057",
    "TRITON_ENDPOINT": "http://localhost:8001",
    "INFERENCE_TIMEOUT_SECS": "5",
    "VOCABULARY_PATH": "../model-repo/vocab.txt",
    "RUST_LOG": "info,amira_rust_asr_server=debug",
}

MODELS_ALLOWED = (
    'a table of names to Triton ensembles (in the environment {"amira": "asr_ensemble"}), '
    "each name 1 … 64 letters, digits, '.', '_' or '-'"
)


def error(directory: Path, /, config: str | None = None, **environ: str) -> str:
    """The message of the ConfigError that loading gives."""
    if config is not None:
        (directory / "config.toml").write_text(config, encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        load_settings(environ, directory)
    message = str(raised.value)
    assert message.isprintable()  # so it is one line
    return message


class TestPrecedence:
    LAYERS = ("config.toml", "config.yaml", "SERVER_PORT", "AMIRA_SERVER_PORT")

    @pytest.mark.parametrize("count", range(len(LAYERS) + 1))
    def test_higher_source_takes_precedence(self, count: int, tmp_path: Path) -> None:
        environ = {}
        for number, layer in enumerate(self.LAYERS[:count]):
            if layer == "config.toml":
                (tmp_path / layer).write_text(f"server_port = {number}")
            elif layer == "config.yaml":
                (tmp_path / layer).write_text(f"server_port: {number}")
            else:
                environ[layer] = str(number)
        loaded = load_settings(environ, tmp_path)
        assert loaded.settings.server_port == (count - 1 if count else 8057)
        assert loaded.sources["server_port"] == (self.LAYERS[count - 1] if count else "default")

    def test_sources_are_merged_by_key(self, tmp_path: Path) -> None:
        (tmp_path / "config.toml").write_text('server_port = 1\nlog_level = "debug"\nlog_format = "console"')
        (tmp_path / "config.yaml").write_text("server_port: 2\nlog_level: error")
        loaded = load_settings({"AMIRA_SERVER_PORT": "3", "SERVER_HOST": "::1"}, tmp_path)
        changed = {key: source for key, source in loaded.sources.items() if source != "default"}
        assert changed == {
            "server_host": "SERVER_HOST",
            "server_port": "AMIRA_SERVER_PORT",
            "log_level": "config.yaml",
            "log_format": "config.toml",
        }
        assert loaded.sources.keys() == Settings.model_fields.keys()
        assert loaded.settings == Settings(server_host="::1", server_port=3, log_level="error", log_format="console")

    @pytest.mark.parametrize(
        ("variable", "key", "text", "value"),
        [
            ("SERVER_HOST", "server_host", "::1", "::1"),
            ("SERVER_PORT", "server_port", "0", 0),
            ("TRITON_ENDPOINT", "triton_endpoint", "triton:1", "triton:1"),
            ("INFERENCE_TIMEOUT_SECS", "inference_timeout_secs", "2.5", 2.5),
        ],
    )
    def test_legacy_variables(self, variable: str, key: str, text: str, value: Any, tmp_path: Path) -> None:
        loaded = load_settings({variable: text}, tmp_path)
        assert getattr(loaded.settings, key) == value
        assert loaded.sources[key] == variable

    def test_empty_variable_counts_as_not_set(self, tmp_path: Path) -> None:
        (tmp_path / "config.toml").write_text('server_port = 1\napi_keys = ["secret"]')
        loaded = load_settings({"AMIRA_SERVER_PORT": "", "AMIRA_API_KEYS": " ", "AMIRA_CONFIG_FILE": ""}, tmp_path)
        assert loaded.settings.server_port == 1
        assert len(loaded.settings.api_keys) == 1

    @pytest.mark.parametrize("name", ["mine.toml", "mine.yaml", "mine.yml"])
    def test_named_file_is_the_only_one(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "config.toml").write_text("server_port = 1\nmax_total_tokens = 1")
        (tmp_path / "config.yaml").write_text("server_port: 2")
        (tmp_path / name).write_text("server_port = 3" if name.endswith("toml") else "server_port: 3")
        for path in (name, str(tmp_path / name)):
            loaded = load_settings({"AMIRA_CONFIG_FILE": path}, tmp_path)
            assert loaded.settings == Settings(server_port=3)
            assert loaded.sources["server_port"] == path

    def test_default_environment_and_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("AMIRA_MAX_TOTAL_TOKENS", "7")
        (tmp_path / "config.toml").write_text("max_symbols_per_step = 8")
        settings = load_settings().settings
        assert (settings.max_total_tokens, settings.max_symbols_per_step) == (7, 8)


class TestValues:
    @pytest.mark.parametrize(
        "text", ["https://a.example,https://b.example:8443", '["https://a.example", "https://b.example:8443"]']
    )
    def test_lists_in_variables(self, text: str, tmp_path: Path) -> None:
        settings = load_settings({"AMIRA_ALLOWED_ORIGINS": text}, tmp_path).settings
        assert settings.allowed_origins == ("https://a.example", "https://b.example:8443")

    def test_tables_in_variables(self, tmp_path: Path) -> None:
        settings = load_settings({"AMIRA_MODELS": '{"amira": "asr_ensemble", "de-1.0": "german"}'}, tmp_path).settings
        assert settings.models == {"amira": "asr_ensemble", "de-1.0": "german"}

    def test_names_of_openai_are_the_first_model(self, tmp_path: Path) -> None:
        settings = load_settings({"AMIRA_MODELS": '{"de": "german", "amira": "asr_ensemble"}'}, tmp_path).settings
        assert settings.model_aliases["whisper-1"] == settings.model_aliases["gpt-4o-transcribe"] == "de"
        assert settings.model_languages == {"amira": "en"}, "that of the bundled ensemble alone is known"

    def test_aliases_replace_those_of_openai(self, tmp_path: Path) -> None:
        given = {"AMIRA_MODEL_ALIASES": '{"Systran/faster-whisper": "amira"}', "AMIRA_MODEL_LANGUAGES": '{"amira": "de"}'}
        settings = load_settings(given, tmp_path).settings
        assert settings.model_aliases == {"Systran/faster-whisper": "amira"}
        assert settings.model_languages == {"amira": "de"}
        with pytest.raises(ConfigError, match=r"must map to names in models, which has no 'nobody'$"):
            load_settings({"AMIRA_MODEL_ALIASES": '{"whisper-1": "nobody"}'}, tmp_path)
        with pytest.raises(ConfigError, match="must be a table of names in models to languages in two letters"):
            load_settings({"AMIRA_MODEL_LANGUAGES": '{"amira": "english"}'}, tmp_path)

    def test_api_keys_are_not_exported(self, tmp_path: Path) -> None:
        loaded = load_settings({"AMIRA_API_KEYS": "first-secret, second-secret"}, tmp_path)
        assert [key.get_secret_value() for key in loaded.settings.api_keys] == ["first-secret", "second-secret"]
        assert "secret" not in f"{loaded}{to_toml(loaded.settings)}{to_yaml(loaded.settings)}"

    @pytest.mark.parametrize(("given", "origins"), [({}, ()), ({"enable_cors": True}, ("*",))])
    def test_cors_without_origins_allows_all(self, given: dict[str, Any], origins: tuple[str, ...]) -> None:
        assert Settings.model_validate(given).allowed_origins == origins
        assert Settings.model_validate(given | {"allowed_origins": ["https://a"]}).allowed_origins == ("https://a",)

    @pytest.mark.parametrize(
        ("endpoint", "address", "ssl"),
        [
            ("http://localhost:8001", "localhost:8001", False),
            ("http://localhost:8001/", "localhost:8001", False),
            ("triton-server:9001", "triton-server:9001", False),
            ("grpc://10.0.0.1", "10.0.0.1:8001", False),
            ("https://triton.example.com:443", "triton.example.com:443", True),
            ("grpcs://[::1]:8001", "[::1]:8001", True),
        ],
    )
    def test_triton_endpoint(self, endpoint: str, address: str, ssl: bool) -> None:
        assert Settings(triton_endpoint=endpoint).triton_addresses == [(address, ssl)]

    def test_several_tritons(self) -> None:
        given = {"AMIRA_TRITON_ENDPOINTS": "a:1, https://b, a:1", "AMIRA_TRITON_ENDPOINT": "c"}
        assert load_settings(given).settings.triton_addresses == [("a:1", False), ("b:8001", True)]
        with pytest.raises(ConfigError, match=r"triton_endpoints = 'a:1,b:c'.*must be a list of endpoints"):
            load_settings({"AMIRA_TRITON_ENDPOINTS": "a:1,b:c"})

    def test_session_key_is_not_exported(self, tmp_path: Path) -> None:
        loaded = load_settings({"AMIRA_SESSION_KEY": "a secret of 24 characters"}, tmp_path)
        assert loaded.settings.session_key
        assert "secret" not in f"{loaded}{to_toml(loaded.settings)}{to_yaml(loaded.settings)}"
        with pytest.raises(ConfigError, match=r"session_key = \*\*\* \(from AMIRA_SESSION_KEY\): must be a text of 16"):
            load_settings({"AMIRA_SESSION_KEY": "too short"}, tmp_path)

    def test_settings_are_frozen(self) -> None:
        with pytest.raises(ValidationError, match="frozen"):
            Settings().server_port = 1  # type: ignore[misc]

    def test_every_setting_is_documented_in_one_line(self) -> None:
        for key, field in Settings.model_fields.items():
            assert field.description, key
            assert field.description.isprintable(), key
            assert field.description.endswith("."), key
            for suffix, unit in (
                ("_secs", "seconds"),
                ("_bytes", "bytes"),
                ("_capacity", "bytes"),
                ("max_request_size", "bytes"),
            ):
                assert not key.endswith(suffix) or unit in field.description, key


class TestBadValues:
    @pytest.mark.parametrize(
        ("key", "text", "allowed"),
        [
            ("server_port", "abc", "a whole number within 0 … 65535"),
            ("server_port", "65536", "a whole number within 0 … 65535"),
            ("server_port", "80.5", "a whole number within 0 … 65535"),
            ("max_concurrent_streams", "0", "a whole number within 1 … 100000"),
            ("max_total_tokens", "-1", "a whole number within 1 … 100000"),
            ("audio_buffer_capacity", "300001", "a whole number within 2 … 1073741824, a multiple of 2"),
            ("audio_buffer_capacity", "4096", "at least max_frame_bytes, which is 262144"),
            ("stream_timeout_secs", "0", "a number within 0.001 … 86400"),
            ("stream_timeout_secs", "nan", "a number within 0.001 … 86400"),
            ("inference_timeout_secs", "5s", "a number within 0.001 … 3600"),
            ("enable_cors", "perhaps", "true or false"),
            ("latency", "high", "one of low, balanced, throughput"),
            ("log_level", "loud", "one of debug, info, warning, error"),
            ("log_format", "xml", "one of json, console"),
            ("server_host", "a b", "a host name or an address"),
            ("service_name", "a/b", "1 … 64 letters, digits, '.', '_' or '-'"),
            (
                "allowed_origins",
                "https://a.example/",
                "a list of origins such as 'https://app.example.com' (no path), or '*' for all",
            ),
            ("allowed_origins", "[", "a list of origins such as 'https://app.example.com' (no path), or '*' for all"),
            *(
                ("triton_endpoint", text, "host:port, optionally after http://, https://, grpc:// or grpcs://")
                for text in ("ftp://a:1", "a:0", "a:65536", "a:b", "a:", "http://a:1/v2", "u:p@a:1", "::1", "http://")
            ),
            *(
                (
                    "models",
                    text,
                    MODELS_ALLOWED,
                )
                for text in (
                    "amira",
                    "{",
                    "{}",
                    '{"a/b": "c"}',
                    '{"a": "../c"}',
                    '{"a": 1}',
                    '{"": "a"}',
                    f'{{"{"a" * 65}": "b"}}',
                )
            ),
        ],
    )
    def test_message_names_key_value_source_and_allowed_values(self, key: str, text: str, allowed: str, tmp_path: Path) -> None:
        variable = f"AMIRA_{key.upper()}"
        assert error(tmp_path, **{variable: text}) == f"{key} = {text!r} (from {variable}): must be {allowed}"

    @pytest.mark.parametrize("text", ["schlüssel", "a b", "good,", '["good", ""]', "[", '["good", 1]'])
    def test_api_keys_are_masked(self, text: str, tmp_path: Path) -> None:
        message = error(tmp_path, AMIRA_API_KEYS=text)
        assert message == "api_keys = *** (from AMIRA_API_KEYS): must be a list of keys in visible ASCII characters"

    @pytest.mark.parametrize(
        ("config", "shown"),
        [
            ("server_port = 'abc'", "server_port = 'abc' (from config.toml): must be a whole number"),
            ("server_port = true", "server_port = True (from config.toml): must be a whole number"),
            ("stream_timeout_secs = inf", "stream_timeout_secs = inf (from config.toml): must be a number"),
            ("server_host = 1", "server_host = 1 (from config.toml): must be a host name"),
            ("enable_cors = 2", "enable_cors = 2 (from config.toml): must be true or false"),
            ("api_keys = 1", "api_keys = *** (from config.toml): must be a list of keys"),
            ("api_keys = ['']", "api_keys = *** (from config.toml): must be a list of keys"),
            ("models = ['amira']", "models = ['amira'] (from config.toml): must be a table of names"),
            (
                "max_frame_bytes = 2097152",
                "audio_buffer_capacity = 1048576 (default): must be at least max_frame_bytes, which is 2097152",
            ),
        ],
    )
    def test_bad_value_in_file(self, config: str, shown: str, tmp_path: Path) -> None:
        assert error(tmp_path, config).startswith(shown)

    def test_message_names_source_with_precedence(self, tmp_path: Path) -> None:
        assert "'b' (from SERVER_PORT)" in error(tmp_path, "server_port = 'a'", SERVER_PORT="b")
        assert "'c' (from AMIRA_SERVER_PORT)" in error(tmp_path, "server_port = 'a'", SERVER_PORT="b", AMIRA_SERVER_PORT="c")

    def test_overridden_bad_value_is_ignored(self, tmp_path: Path) -> None:
        (tmp_path / "config.toml").write_text("server_port = 'a'")
        assert load_settings({"AMIRA_SERVER_PORT": "1"}, tmp_path).settings.server_port == 1


class TestBadFiles:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ("server_prot = 1", "server_prot (from config.toml): is not a setting; did you mean server_port?"),
            ("encoder_pool = 1", "encoder_pool (from config.toml): is not a setting; did you mean encoder_pool_size?"),
            ("api_key = 'secret'", "api_key (from config.toml): is not a setting; did you mean api_keys?"),
            ("zzz = 1", "zzz (from config.toml): is not a setting"),
            ("[server]\nport = 1", "server (from config.toml): is not a setting; did you mean server_port?"),
        ],
    )
    def test_unknown_key(self, config: str, message: str, tmp_path: Path) -> None:
        assert error(tmp_path, config) == message

    def test_invalid_toml(self, tmp_path: Path) -> None:
        message = error(tmp_path, "log_level = 'info'\nserver_port = ")
        assert re.fullmatch(r"config\.toml: is not valid TOML: .* \(at .*\)", message)

    def test_file_that_is_not_utf_8(self, tmp_path: Path) -> None:
        (tmp_path / "config.toml").write_bytes(b"\xff\xfe")
        assert error(tmp_path).startswith("config.toml: is not valid TOML: 'utf-8' codec can't decode")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (
                "api_keys: secret: secret",
                "is not valid YAML: mapping values are not allowed here (at line 1, column 17)",
            ),
            ("server_host: \0", "is not valid YAML: unacceptable character #x0000: special characters are not allowed"),
            ("- server_port", "must be a table of keys and values"),
            ("server_port", "must be a table of keys and values"),
            ("1: 2", "1 (from config.yaml): is not a setting"),
        ],
    )
    def test_invalid_yaml(self, content: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text(content)
        shown = error(tmp_path)
        assert message in shown
        assert "secret" not in shown

    def test_named_file_that_is_not_usable(self, tmp_path: Path) -> None:
        (tmp_path / "config.toml").write_text("server_port = 1")
        for name in ("mine.json", "mine"):
            message = f"AMIRA_CONFIG_FILE = '{name}': must be a .toml or .yaml or .yml file"
            assert error(tmp_path, AMIRA_CONFIG_FILE=name) == message
        message = "AMIRA_CONFIG_FILE = 'mine.toml': is not readable: No such file or directory"
        assert error(tmp_path, AMIRA_CONFIG_FILE="mine.toml") == message

    def test_directory_instead_of_file(self, tmp_path: Path) -> None:
        (tmp_path / "config.toml").mkdir()
        assert error(tmp_path) == "config.toml: is not readable: Is a directory"

    @pytest.mark.parametrize("content", ["", "# nothing"])
    @pytest.mark.parametrize("name", ["config.toml", "config.yaml"])
    def test_empty_file_is_valid(self, name: str, content: str, tmp_path: Path) -> None:
        (tmp_path / name).write_text(content)
        assert load_settings({}, tmp_path) == (Settings(), dict.fromkeys(Settings.model_fields, "default"), [])


class TestNotices:
    def test_keys_without_effect_give_one_notice(self, tmp_path: Path) -> None:
        (tmp_path / "config.toml").write_text("vocabulary_path = 'vocab.txt'\nencoder_pool_size = 50")
        loaded = load_settings({"VOCABULARY_PATH": "a", "AMIRA_VOCABULARY_PATH": "b", "AMIRA_ENABLE_NUMA": "true"}, tmp_path)
        assert loaded.notices == [
            "vocabulary_path (from AMIRA_VOCABULARY_PATH) has no effect: the vocabulary is part of the model repository",
            "enable_numa (from AMIRA_ENABLE_NUMA) has no effect: the operating system places memory",
            "encoder_pool_size (from config.toml) has no effect: Triton manages the tensors",
        ]
        assert loaded.settings == Settings()

    def test_unknown_variables(self, tmp_path: Path) -> None:
        environ = {"AMIRA_SERVER_PROT": "1", "AMIRA_ZZZ": "1", "SERVER_PROT": "1", "RUST_LOG": "debug"}
        assert load_settings(environ, tmp_path).notices == [
            "AMIRA_SERVER_PROT has no effect: it is not a setting; did you mean AMIRA_SERVER_PORT?",
            "AMIRA_ZZZ has no effect: it is not a setting",
        ]

    @pytest.mark.parametrize("name", sorted(LAUNCHER_VARIABLES))
    def test_launcher_variables_give_no_notice(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "a.toml").touch()
        assert load_settings({name: "a.toml"}, tmp_path).notices == []


class TestLegacyServers:
    def test_config_file(self, tmp_path: Path) -> None:
        (tmp_path / "config.toml").write_text(LEGACY_CONFIG)
        loaded = load_settings({}, tmp_path)
        assert loaded.settings == Settings(
            max_concurrent_batches=50, max_batch_audio_length_secs=30, max_symbols_per_step=30, max_total_tokens=200
        )
        assert len(loaded.notices) == 5

    def test_tuning_file(self, tmp_path: Path) -> None:
        (tmp_path / "config.toml").write_text(LEGACY_TUNING)
        loaded = load_settings({}, tmp_path)
        assert loaded.settings == Settings(audio_buffer_capacity=2 * 2**20)
        assert len(loaded.notices) == 6

    def test_environment(self, tmp_path: Path) -> None:
        loaded = load_settings(LEGACY_ENVIRONMENT, tmp_path)
        assert loaded.settings == Settings(
            triton_endpoint="http://triton-server:8001",
            inference_timeout_secs=10,
            max_concurrent_streams=50,
            max_concurrent_batches=200,
            max_request_size=10_485_760,
            max_batch_audio_length_secs=30,
            max_symbols_per_step=30,
            max_total_tokens=200,
            jaeger_endpoint="http://localhost:14268/api/traces",
        )
        own = {name for name in LEGACY_ENVIRONMENT if name.startswith("AMIRA_")}
        live = {source for source in loaded.sources.values() if source != "default"}
        told = {name for name in own for notice in loaded.notices if f"(from {name}) has no effect" in notice}
        assert live | told == own
        assert len(live) + len(loaded.notices) == len(own)

    def test_keys_without_effect_are_all_legacy_keys(self) -> None:
        keys = re.findall(r"^(\w+) =", LEGACY_CONFIG + LEGACY_TUNING, re.MULTILINE)
        keys += [name.removeprefix("AMIRA_").lower() for name in LEGACY_ENVIRONMENT]
        assert KEYS_WITHOUT_EFFECT.keys() <= set(keys)
        assert not KEYS_WITHOUT_EFFECT.keys() & Settings.model_fields.keys()


class TestShippedConfig:
    def test_has_the_defaults(self) -> None:
        loaded = load_settings({}, SHIPPED.parent)
        assert loaded.settings == Settings()
        assert loaded.notices == []

    def test_names_exactly_the_settings(self) -> None:
        named = re.findall(r"^(?:# )?(\w+) = ", SHIPPED.read_text(encoding="utf-8"), re.MULTILINE)
        assert sorted(named) == sorted(Settings.model_fields)

    def test_loads_with_commented_settings(self, tmp_path: Path) -> None:
        undone = re.sub(r"^# (?=\w+ = )", "", SHIPPED.read_text(encoding="utf-8"), flags=re.MULTILINE)
        (tmp_path / "config.toml").write_text(undone, encoding="utf-8")
        assert set(load_settings({}, tmp_path).sources.values()) == {"config.toml"}


class TestExport:
    CHANGED = Settings(
        server_host="::1",
        triton_endpoint="grpcs://triton:8001",
        inference_timeout_secs=0.25,
        models={"de-1.0": "german", "amira": "asr_ensemble"},
        max_total_tokens=7,
        enable_cors=True,
        log_format="console",
    )

    @pytest.mark.parametrize("settings", [Settings(), CHANGED], ids=["defaults", "changed"])
    @pytest.mark.parametrize(("name", "export"), [("config.toml", to_toml), ("config.yaml", to_yaml)])
    def test_round_trip(self, name: str, export: Any, settings: Settings, tmp_path: Path) -> None:
        (tmp_path / name).write_text(export(settings), encoding="utf-8")
        assert load_settings({}, tmp_path).settings == settings

    @pytest.mark.parametrize(("name", "export"), [("config.toml", to_toml), ("config.yaml", to_yaml)])
    def test_every_setting_is_shown_with_its_source(self, name: str, export: Any, tmp_path: Path) -> None:
        (tmp_path / "config.toml").write_text('log_level = "debug"\nallowed_origins = ["https://a", "https://b"]')
        (tmp_path / "config.yaml").write_text("server_port: 1\nmodels: {latency: a, max_total_tokens: b}")
        environ = {"AMIRA_MAX_SYMBOLS_PER_STEP": "7", "SERVER_HOST": "::1", "AMIRA_API_KEYS": "some-secret"}
        loaded = load_settings(environ, tmp_path)
        shown = export(loaded.settings, loaded.sources)
        assert "some-secret" not in shown
        expected = {
            "log_level": "config.toml",
            "allowed_origins": "config.toml",
            "server_port": "config.yaml",
            "models": "config.yaml",
            "max_symbols_per_step": "AMIRA_MAX_SYMBOLS_PER_STEP",
            "server_host": "SERVER_HOST",
            "api_keys": "AMIRA_API_KEYS",
        }
        for key in Settings.model_fields:
            (line,) = re.findall(rf"^(?:# |\[)?{key}\b.*  # .*$", shown, re.MULTILINE)
            assert line.endswith(f"  # {expected.get(key, 'default')}")
        assert f"# api_keys is not shown  # {expected['api_keys']}" in shown
        assert "# session_key is not set  # default" in shown
        (tmp_path / "shown").mkdir()
        (tmp_path / "shown" / name).write_text(shown, encoding="utf-8")
        again = load_settings({}, tmp_path / "shown").settings
        assert again == loaded.settings.model_copy(update={"api_keys": ()})

    def test_toml_omits_unset_values(self) -> None:
        assert "max_total_tokens" not in to_toml(Settings())
        assert "max_total_tokens = 7" in to_toml(self.CHANGED)

    def test_yaml_omits_secrets_only(self) -> None:
        assert yaml.safe_load(to_yaml(Settings())).keys() == Settings.model_fields.keys() - SECRETS
